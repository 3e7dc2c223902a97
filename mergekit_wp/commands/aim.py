"""`mergekit-wp aim`."""

from __future__ import annotations

from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.commands.shown import progress
from mergekit_wp.merging.request import AimRequest


@click.command(cls=OnceEach, short_help="Apply Activation-Informed Merging to a merge.")
@options_of(AimRequest)
def aim(**options: Any) -> None:
    """Apply Activation-Informed Merging (arXiv 2502.02421) to the checkpoint MERGED.

    Whatever method made the merge: the weights of input channels that the base uses most on the
    calibration texts keep most of the base's values. Embeddings, norms and a tied output head stay
    as merged. The folder appears only when it is complete.

    \b
      mergekit-wp aim merged/ --base BASE --calibration prompts.jsonl --out merged-aim/
    """
    from mergekit_wp.merging.aim import aim as run

    request = AimRequest.of(**options)
    with progress() as bar:
        run(request, bar)
    click.echo(f"model written to {request.out}")
