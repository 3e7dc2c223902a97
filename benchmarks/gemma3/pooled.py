"""The benchmark's tables over all combinations, from the comparisons in build/gemma3/compare.

``python -m benchmarks.gemma3.pooled`` prints them.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.comparisons import options, show
from benchmarks.gemma3.tasks import GEMMA3


@click.command()
@options
def main(seed: int, fit: str, n: int) -> None:
    """Print the tables."""
    click.echo(show(replace(GEMMA3, seed=seed), fit, n))


if __name__ == "__main__":
    main()
