"""The benchmark's tables over all combinations, from the comparisons in build/smollm2/compare.

``python -m benchmarks.smollm2.pooled`` prints them.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.comparisons import options, show
from benchmarks.smollm2.paths import SMOLLM2


@click.command()
@options
def main(seed: int, fit: str, n: int) -> None:
    """Print the tables."""
    click.echo(show(replace(SMOLLM2, seed=seed), fit, n))


if __name__ == "__main__":
    main()
