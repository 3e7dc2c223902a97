"""The benchmark's tables over all combinations, from the comparisons in build/gemma3/compare.

``python -m benchmarks.gemma3.pooled`` prints them.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.comparisons import show
from benchmarks.gemma3.tasks import GEMMA3


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the experts' training.")
def main(seed: int) -> None:
    """Print the tables."""
    click.echo(show(replace(GEMMA3, seed=seed)))


if __name__ == "__main__":
    main()
