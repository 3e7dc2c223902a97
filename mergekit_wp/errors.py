"""Exceptions that the command line turns into one line, and how messages name options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

#: characters of a message; a file from elsewhere may have names of any length
_LONGEST = 2000
#: an option within a message; its marks are no printable text, and no white space
_OPTION = re.compile("\x01([a-z_]+)(?:\x02([^\x03]*))?\x03")


def clean(text: str) -> str:
    """Text without control characters: a file from elsewhere cannot steer the terminal."""
    return "".join(
        ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text
    )


def option(name: str, value: object = None) -> str:
    """Name an option in a message. How it is spelt is for whoever shows the message to say.

    Args:
        name: of the request's field or the function's argument.
        value: what it is or should be set to; None names the option alone.

    Returns:
        A mark that `UserError` and `spelled` turn into ``name=value``, or ``--name value``.
    """
    return f"\x01{name}\x03" if value is None else f"\x01{name}\x02{clean(str(value))}\x03"


def spelled(message: str, flags: Mapping[str, str] | None = None) -> str:
    """One printable line, with the options in it spelt out.

    Args:
        message: with marks of `option`.
        flags: a command's own, by option; one that it does not have is its name in kebab case.
            None for Python's spelling, ``name=value``.
    """

    def spelt(mark: re.Match[str]) -> str:
        name, value = mark.groups()
        if flags is None:
            return name if value is None else f"{name}={value}"
        flag = flags[name] if name in flags else "--" + name.replace("_", "-")
        return flag if value in (None, "True") else f"{flag} {value}"

    return clean(_OPTION.sub(spelt, " ".join(message.split())))[:_LONGEST]


class UserError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what to do.

    The command line prints it as one line on stderr and exits with status 2. Whatever the message
    quotes, it is one printable line. It names options by `option`, as arguments of Python until a
    command calls them by its flags.
    """

    def __init__(self, message: str) -> None:
        """Take the message, made one line."""
        self._message = message
        super().__init__(spelled(message))

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        """From another process as it was raised there, its options still to be spelt."""
        return type(self), (self._message,)

    def use_flags(self, flags: Mapping[str, str]) -> None:
        """Spell the options that the message names as a command does; see `spelled`."""
        self.args = (spelled(self._message, flags),)


class OutOfMemory(UserError):
    """Not even one sequence fits into memory, whatever it is run through."""


class DiskError(Exception):
    """A disk is full or failing, through no fault of the request: one line, exit status 1.

    Attributes:
        kept: the folder with the work that is done, where there is one.
    """

    kept: Path | None = None
