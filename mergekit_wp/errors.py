"""Exceptions that the command line turns into one line."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what to do.

    The command line prints it as one line on stderr and exits with status 2.
    """


class DiskError(Exception):
    """A disk is full or failing, through no fault of the request: one line, exit status 1.

    Attributes:
        kept: the folder with the work that is done, where there is one.
    """

    kept: Path | None = None
