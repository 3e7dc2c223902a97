"""The benchmark's tables over all combinations and training seeds.

``python -m benchmarks.gemma3.pooled`` prints them, of the comparisons in build/gemma3 and of
those that are committed.
"""

from __future__ import annotations

import click

from benchmarks.comparisons import options, show
from benchmarks.gemma3.tasks import GEMMA3


@click.command()
@options
def main(
    seeds: tuple[int, ...], fits: tuple[str, ...], n: int, only: str | None, record: bool
) -> None:
    """Print the tables."""
    click.echo(show(GEMMA3, seeds, fits, n, only, record=record))


if __name__ == "__main__":
    main()
