"""Exceptions that the command line turns into one line."""

from __future__ import annotations

from pathlib import Path

#: characters of a message; a file from elsewhere may have names of any length
_LONGEST = 2000


def clean(text: str) -> str:
    """Text without control characters: a file from elsewhere cannot steer the terminal."""
    return "".join(
        ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text
    )


class UserError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what to do.

    The command line prints it as one line on stderr and exits with status 2. Whatever the message
    quotes, it is one printable line.
    """

    def __init__(self, message: str) -> None:
        """Take the message, made one line."""
        super().__init__(clean(" ".join(message.split()))[:_LONGEST])


class OutOfMemory(UserError):
    """Not even one sequence fits into memory, whatever it is run through."""


class DiskError(Exception):
    """A disk is full or failing, through no fault of the request: one line, exit status 1.

    Attributes:
        kept: the folder with the work that is done, where there is one.
    """

    kept: Path | None = None
