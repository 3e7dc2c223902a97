"""The one exception type for mistakes a user can mend."""


class UserError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what to do.

    The command line prints it as one line on stderr and exits with status 2.
    """
