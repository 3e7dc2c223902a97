"""`mergekit-wp behaviors`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.tasks.request import BehaviorsRequest


@click.command("behaviors", cls=OnceEach, short_help="List the built-in behaviours, or export one.")
@options_of(BehaviorsRequest)
def behaviors(name: str | None, out: Path | None, items: Path | None) -> None:
    """List the built-in behaviours, or write the files of the behaviour NAME.

    A behaviour is an instruction that a rule can check, put to many requests. Its prompt file has
    each request with the instruction, and without it as `contrast`; its items are other requests
    in another wording, for `compare` and for `verify --task`.

    \b
      mergekit-wp behaviors capitals --out capitals.jsonl --items capitals-items.jsonl
      mergekit-wp score base/ expert/ --prompts capitals.jsonl --out capitals.safetensors
    """
    from mergekit_wp.errors import UserError
    from mergekit_wp.tasks import behaviors as built_in

    if name is None:
        if out or items:
            raise UserError("name the behaviour to write: mergekit-wp behaviors NAME --out FILE")
        for each, found in built_in.behaviors().items():
            click.echo(f"{each:<12}{found.says} ({found.instruction_id})")
    elif not (out or items):
        click.echo(built_in.jsonl(built_in.behavior(name).prompts()), nl=False)
    else:
        for path in built_in.export(name, out, items):
            click.echo(f"{path} written")
