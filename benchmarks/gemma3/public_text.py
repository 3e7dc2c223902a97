"""Perplexity of the merges of all three experts on published text.

``python -m benchmarks.gemma3.public_text --seed 3 --fit "--steps 60"`` reads and commits it,
``--print`` prints what is committed.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.fit_table import FitTable, split_options
from benchmarks.gemma3.tasks import GEMMA3, MAX_NEW_TOKENS
from benchmarks.public_text import options, run


@click.command()
@options
def main(methods: str, fit: str, n: int, seed: int, print_only: bool) -> None:
    """Merge as the comparison of all experts chose to, read, print."""
    table = FitTable(replace(GEMMA3, seed=seed), split_options(fit), n=n)
    run(table, methods, MAX_NEW_TOKENS, print_only=print_only)


if __name__ == "__main__":
    main()
