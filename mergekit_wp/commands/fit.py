"""`mergekit-wp fit`."""

from __future__ import annotations

from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import merge_by, progress
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.joint.request import FitRequest


@click.command(cls=OnceEach, short_help="Fit the gates of all experts jointly, by gradient.")
@options_of(
    FitRequest, DryRunRequest, exclude=("batch_size",), required=("out",), several=("recipe",)
)
def fit(dry_run: bool, **options: Any) -> None:
    """Fit the gates of every expert of a RECIPE, or of BASE EXPERT EXPERT ..., all together.

    A gate multiplies a part of the expert's difference from the base: 0 keeps the base, 1 takes the
    expert.
    The objective is how far the merge has come from the base (0) to each expert (1) in its answers'
    distribution, the worst behaviour counting most, while guards stay within a limit of the base.
    It ends when no more of the experts' answers are reproduced. The merged model, its residual
    streams, and one layer's gradients and differences are in memory; the rest is streamed. For
    three experts, 8 prompts of 256 tokens each in a step, in bfloat16, a 1B model needs about 11
    GiB and 0.06 PFLOP a step, 8B 29 GiB and 0.4, 70B 170 GiB and 3.5 (computed: docs/fit.md).
    --dry-run says what yours takes.

    \b
      mergekit-wp fit recipe.yml --prompts inst=inst.jsonl --prompts math=math.jsonl \\
          --out fitted
      mergekit-wp merge fitted/recipe.yml merged/
    """
    from mergekit_wp import api

    with progress(dry_run) as bar:
        found = api.fit(**given(FitRequest, options), progress=bar)
    click.echo(merge_by(options["out"], found))
