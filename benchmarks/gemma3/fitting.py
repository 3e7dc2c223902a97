"""Fit every combination of the three experts, and print what it keeps and costs.

``python -m benchmarks.gemma3.fitting`` (from the repository's root) makes what is missing in
build/gemma3 and resumes; ``--only dates-records`` makes one combination, ``--print`` none.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.combinations import make_missing
from benchmarks.fit_table import FitTable, options, run, split_options
from benchmarks.gemma3.tasks import GEMMA3, MAX_NEW_TOKENS


@click.command()
@options
def main(
    only: str | None, seeds: tuple[int, ...], fit: str, n: int, print_only: bool, record: bool
) -> None:
    """Fit, merge, measure, print."""
    families = [replace(GEMMA3, seed=seed) for seed in seeds]
    for family in () if print_only else families:
        make_missing(family)
    found = [FitTable(family, split_options(fit), n=n) for family in families]
    run(found, only, MAX_NEW_TOKENS, print_only=print_only, record=record)


if __name__ == "__main__":
    main()
