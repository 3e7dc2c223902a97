"""`mergekit-wp fit`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mergekit_wp.commands.options import running


@click.command(short_help="Fit component gates jointly, by gradient.")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--prompts",
    required=True,
    multiple=True,
    metavar="EXPERT=FILE",
    help="Prompt file of what EXPERT is to be kept for, once per expert of the recipe; EXPERT is "
    "its folder's or repository's last name. No labels are needed: the expert itself is the "
    "teacher.",
)
@click.option(
    "--guard",
    "guards",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompt file on which the merge is to stay like the base; may be given several times.",
)
@click.option(
    "--guard-weight",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Weight of all guards together, beside 1 for all experts together.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write into: a score file for each expert, and a recipe that merges by them. A "
    "killed run goes on where it was.",
)
@click.option(
    "--start",
    default="0.5",
    show_default=True,
    metavar="NUMBER|scores",
    help="Gates to start from: one number, or those by which RECIPE merges. To go on from an "
    "earlier fit, give its recipe and `--start scores`.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Most steps of the fit.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far a gate moves in the first step, about; it falls evenly to 0 at the last.",
)
@click.option(
    "--prompts-a-step",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Prompts of every behaviour in one step.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.25,
    show_default=True,
    help="Part of the prompts that is only looked at, every five steps: the gates that do best "
    "there are kept, and six looks in vain end the fit. 0 fits on all, and keeps the last.",
)
@click.option(
    "--penalty",
    type=click.FloatRange(0),
    default=0.01,
    show_default=True,
    help="Pull towards few gates and round ones: times the mean of g + g|1 - g|, beside an "
    "objective of about 1.",
)
@click.option(
    "--upper",
    type=click.FloatRange(0, min_open=True),
    default=1.5,
    show_default=True,
    help="Largest gate; the smallest is 0.",
)
@running
@click.option("--restart", is_flag=True, help="Throw away what a killed run left, begin anew.")
def fit(prompts: tuple[str, ...], **options: Any) -> None:
    """Fit one gate for every component of every expert of a RECIPE, all together.

    A gate multiplies the expert's difference from the base: 0 keeps the base, 1 takes the expert.
    The objective is the mean over behaviours of how far the merge has come from the base (0) to the
    expert (1) in its answers' distribution. The merged model, its residual streams, and one layer's
    gradients and differences are in memory; the rest is streamed. For three experts, 8 prompts of
    256 tokens each in a step, in bfloat16, a 1B model needs about 11 GiB and 0.06 PFLOP a step, 8B
    29 GiB and 0.4, 70B 170 GiB and 3.5 (computed: docs/fit.md).

    \b
      mergekit-wp fit recipe.yml --prompts inst=inst.jsonl --prompts math=math.jsonl \\
          --guard plain.jsonl --out fitted
      mergekit-wp merge fitted/recipe.yml merged/
    """
    import huggingface_hub
    import transformers

    from mergekit_wp.autoload import ensure_registered
    from mergekit_wp.errors import UserError
    from mergekit_wp.joint.files import RECIPE
    from mergekit_wp.joint.fit import fit as run
    from mergekit_wp.joint.request import FitRequest
    from mergekit_wp.models.placement import choose_device
    from mergekit_wp.runs.progress import BarProgress

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    ensure_registered()
    options["device"] = choose_device(options["device"])
    if options["batch_size"] is not None:
        raise UserError("--batch-size does not go with fit; give --prompts-a-step")
    pairs = []
    for given in prompts:
        expert, equals, file = given.partition("=")
        if not equals:
            raise UserError(f"--prompts {given}: write EXPERT=FILE.jsonl")
        pairs.append((expert, Path(file)))
    progress = BarProgress()
    try:
        found = run(FitRequest(prompts=tuple(pairs), **options), progress)
    finally:
        progress.close()
    out = options["out"]
    click.echo(
        f"{', '.join(str(out / f'{name}.safetensors') for name in found)} written; merge by them "
        f"with: mergekit-wp merge {out / RECIPE} OUT"
    )
