"""One module a subcommand: it parses, calls the library and prints; the logic lives below."""
