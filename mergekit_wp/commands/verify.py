"""`mergekit-wp verify`."""

from __future__ import annotations

from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import progress, prompt_file
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.mechanism.request import VerifyRequest


@click.command(cls=OnceEach, short_help="What do the leading components do together?")
@options_of(VerifyRequest, DryRunRequest, optional=("prompts",))
def verify(dry_run: bool, **options: Any) -> None:
    """Swap the leading components of the score FILE together, and see what that does.

    Restoration is the base with the top K components of the expert: how much of the behaviour comes
    back (1 is all of it). Knockout is the expert with its top K set back to the base: how much is
    lost. Beside them stand the bottom K, and random sets with as many components of every kind.
    The curve is printed and written into FILE's manifest, for `inspect` and `plot`. `kl` is the
    divergence of the output from the expert's, scaled to 0 at the base and 1 at the expert. Use
    prompts that were not scored on.

    \b
      mergekit-wp verify expert.safetensors --top 1%,5%,20% --prompts held-out.jsonl
      mergekit-wp verify expert.safetensors --top 1%,5%,20% --builtin capitals
    """
    from mergekit_wp import api
    from mergekit_wp.report.verification import table

    with progress(dry_run) as bar, prompt_file(options) as path:
        fields = given(VerifyRequest, options | {"prompts": path})
        found = api.verify(**fields, progress=bar)
    click.echo(table(found))
    click.echo(f"\nwritten into {options['file']}")
