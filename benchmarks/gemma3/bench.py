"""Three experts of Gemma 3 270M, every combination, every method, through the public commands.

``python -m benchmarks.gemma3.bench`` (from the repository's root) makes what is missing: the base,
tasks, the experts by training, fits and scores, and a comparison for each combination in
build/gemma3/compare/NAME. Everything resumes.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.combinations import options, run
from benchmarks.gemma3.tasks import GEMMA3, MAX_NEW_TOKENS


@click.command()
@options
def main(methods: str | None, only: str | None, fit: str, n: int, seed: int) -> None:
    """Make what is missing and compare."""
    run(replace(GEMMA3, seed=seed), methods, only, fit, n, MAX_NEW_TOKENS)


if __name__ == "__main__":
    main()
