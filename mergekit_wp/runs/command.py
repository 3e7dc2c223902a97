"""The command that makes a file again, kept in the file with the versions that ran it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import mergekit_wp
from mergekit_wp.runs.request import RunRequest

RUN = ("max_prompts", "batch_size", "dtype", "device", "seed", "max_new_tokens")


@singledispatch
def command_of(request: RunRequest) -> tuple[str, ...]:
    """The arguments of `mergekit-wp` that ask for this, but for the file that it writes.

    A file's content does not depend on where it is put.

    Raises:
        TypeError: no command makes a file from such a request.
    """
    raise TypeError(type(request).__name__)


def options_of(request: BaseModel, fields: tuple[str, ...], names: dict[str, str]) -> Iterator[str]:
    """The options that give some fields their values; ``names`` are those spelt otherwise."""
    for field in fields:
        for value in _values(getattr(request, field)):
            yield f"--{names.get(field, field).replace('_', '-')}"
            yield value


def _values(value: Any) -> Iterator[str]:
    """What the option is given: nothing for None, several times for paths, commas for names."""
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        for part in value:
            yield str(part) if isinstance(part, Path) else "=".join(map(str, part))
    elif isinstance(value, tuple):
        if value:
            yield ",".join(value)
    elif value is not None:
        yield repr(value) if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Of this package, and of those that the numbers depend on."""
    packages = ("torch", "transformers", "mergekit", "safetensors")
    others = {name: importlib.metadata.version(name) for name in packages}
    return {"mergekit-wp": mergekit_wp.__version__, **others}
