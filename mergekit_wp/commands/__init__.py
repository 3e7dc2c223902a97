"""One module a subcommand; the logic lives below them."""
