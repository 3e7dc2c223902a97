"""How a command calls what messages of the library name; see `errors.option`."""

from __future__ import annotations

import click


def flags(command: click.Command) -> dict[str, str]:
    """What a user types, by parameter: an option's flag, an argument's name in ``--help``."""
    return {str(each.name): _typed(each) for each in command.params}


def _typed(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return str(parameter.name).upper()
