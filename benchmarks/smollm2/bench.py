"""Three real experts, every combination, every method, through the public commands.

``python -m benchmarks.smollm2.bench`` (from the repository's root) makes what is missing: the base,
tasks, the experts from their cached adapters (of seed 0; of others by training), fits and scores,
and a comparison for each combination in build/smollm2/compare/NAME. Everything resumes.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.combinations import options, run
from benchmarks.files import IFEVAL
from benchmarks.smollm2.paths import SMOLLM2
from benchmarks.smollm2.tasks import MAX_NEW_TOKENS


@click.command()
@options
def main(methods: str | None, only: str | None, fit: str, n: int, seed: int) -> None:
    """Make what is missing and compare."""
    if not IFEVAL.exists():
        raise click.ClickException(f"{IFEVAL} is missing; it holds IFEval's prompts")
    run(replace(SMOLLM2, seed=seed), methods, only, fit, n, MAX_NEW_TOKENS)


if __name__ == "__main__":
    main()
