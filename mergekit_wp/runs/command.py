"""The command that makes a file again, kept in the file with the versions that ran it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_wp.options import Declared, Places, Request, declared
from mergekit_wp.version import __version__


def command_of(request: Request) -> tuple[str, ...]:
    """The arguments of `mergekit-wp` that ask for this, but for the file that it writes.

    A file's content does not depend on where it is put. Empty where no command can ask for it:
    with a caller's own function, or prompts that are in no file.
    """
    fields = declared(type(request))
    given = {name: _value(request, name) for name in fields}
    replaced = {f.option.instead_of for name, f in fields.items() if given[name] is not None}
    kept = [
        (field, given[name])
        for name, field in fields.items()
        if field.option.stored and name != request.writes and name not in replaced
    ]
    if not all(_in_words(value) for _, value in kept):
        return ()
    places, options = list[str](), list[str]()
    for field, value in kept:
        if isinstance(value, Places):
            places += value.arguments()
        elif field.positional:
            places.append(str(value))
        else:
            options += _option(field, value)
    return (request.command, *places, *options)


def _value(request: Request, name: str) -> Any:
    found: Any = request
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _in_words(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_in_words(part) for part in value)
    if isinstance(value, Places):
        return bool(value.arguments())
    return value is None or isinstance(value, str | int | float | Path)


def _option(field: Declared, value: Any) -> Iterator[str]:
    """Nothing for None, several times for what is repeated, commas for names."""
    if value is None or value is False:
        return
    if value is True:
        yield field.flag
    elif field.element is None:
        yield from (field.flag, repr(value) if isinstance(value, float) else str(value))
    elif field.repeated:
        for part in value:
            yield field.flag
            yield "=".join(map(str, part)) if isinstance(part, tuple) else str(part)
    elif value:
        yield from (field.flag, ",".join(map(str, value)))


def versions() -> dict[str, str]:
    """Of this package, and of those that the numbers depend on."""
    packages = ("torch", "transformers", "mergekit", "safetensors")
    others = {name: importlib.metadata.version(name) for name in packages}
    return {"mergekit-wp": __version__, **others}
