"""`mergekit-wp score`."""

from __future__ import annotations

import shlex
from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import progress
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.scoring.request import ScoreRequest


@click.command(
    cls=OnceEach,
    short_help="Measure what each component of an expert does.",
    context_settings={"allow_extra_args": True},  # to say what is for several experts
)
@options_of(ScoreRequest, DryRunRequest, required=("out",))
@click.pass_context
def score(context: click.Context, /, dry_run: bool, **options: Any) -> None:
    """Measure how much of EXPERT's behaviour each component of its weights carries.

    BASE and EXPERT are folders or Hub ids (owner/name@revision) of one architecture; EXPERT may be
    MODEL+ADAPTER, with a LoRA adapter that is never merged on disk. Components are attention heads,
    K/V groups, MLP neurons, whole tensors and layers. The score file is small, names the
    checkpoints it belongs to, and is what a `weight_patching` recipe reads.

    \b
      mergekit-wp score base/ expert/ --prompts prompts.jsonl --out expert.safetensors

    Start the same command again after a crash: it continues. Cost is counted in forward passes
    over all prompts; the heads of a model are swapped one by one for about half as many passes as
    it has heads, all neurons are estimated by a dozen.

    To merge several experts, fit them together (`mergekit-wp fit`): what restores a behaviour in
    the base is not what survives beside another expert.
    """
    from mergekit_wp import api
    from mergekit_wp.errors import UserError

    if context.args:
        raise UserError(
            f"score measures one expert, and '{context.args[0]}' is one more; to merge several, "
            "fit them together: mergekit-wp fit BASE EXPERT EXPERT --prompts EXPERT=FILE "
            "--prompts EXPERT=FILE --out FOLDER"
        )
    with progress(dry_run) as bar:
        api.score(**given(ScoreRequest, options), progress=bar)
    look = shlex.join(["mergekit-wp", "inspect", str(options["out"])])
    click.echo(f"{options['out']} written; look at it with: {look}")
