"""`mergekit-wp aim`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(short_help="Apply Activation-Informed Merging to a merge.")
@click.argument("merged")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The merge's base: a folder or Hub id.")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompt file (JSONL with 'prompt', optional 'response') whose texts the base's "
    "activations are measured on.",
)
@click.option(
    "--omega",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="How much of the change stays in the base's most active channel; 1 changes nothing.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Texts per forward pass; halved when memory runs out.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
def aim(merged: str, out: Path, **options: Any) -> None:
    """Apply Activation-Informed Merging (arXiv 2502.02421) to the checkpoint MERGED, into OUT.

    Whatever method made the merge: the weights of input channels that the base uses most on the
    calibration texts keep most of the base's values. Embeddings, norms and a tied output head stay
    as merged. OUT appears only when it is complete.

    \b
      mergekit-wp aim merged/ merged-aim/ --base BASE --calibration prompts.jsonl
    """
    import transformers

    from mergekit_wp.merging.aim import aim as run
    from mergekit_wp.runs.progress import BarProgress

    transformers.logging.set_verbosity_error()
    progress = BarProgress()
    try:
        run(merged, out, progress=progress, **options)
    finally:
        progress.close()
    click.echo(f"model written to {out}")
