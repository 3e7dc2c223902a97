"""`mergekit-wp stability`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.mechanism.request import StabilityRequest


@click.command(cls=OnceEach, short_help="Compare the rankings of score files.")
@options_of(StabilityRequest)
def stability(file: Path, others: tuple[Path, ...], seed: int) -> None:
    """Compare score FILE with OTHERS of the same architecture, component by component.

    An other file may be the same expert on another behaviour, another run of it, or another
    expert, such as one of another training seed. For each kind: the rank correlation with its 95%
    interval (layers resampled), and the Jaccard overlap of the leading 1%. Beside them stand the
    halves of the prompts, which `score` has measured: no ranking agrees with another one better
    than with itself. The result is printed and written into FILE's manifest, for `inspect` and
    `plot`.

    \b
      mergekit-wp stability caps.safetensors title.safetensors
      mergekit-wp stability seed0.safetensors seed1.safetensors seed2.safetensors
    """
    from mergekit_wp.api import stability as run
    from mergekit_wp.report.mechanism import agreement_table

    click.echo(agreement_table(run(file, others, seed=seed)))
    if others:
        click.echo(f"\nwritten into {file}")
