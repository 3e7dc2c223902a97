"""Fit every combination of the real experts, and print what it keeps and costs.

``python -m benchmarks.smollm2.fitting`` (from the repository's root) makes what is missing in
build/smollm2 (of another training seed: build/smollm2/seed-N) and resumes; ``--only
instruction-math`` makes one combination, ``--print`` none. *Unasked* is how often a rule is kept by
an answer to the test requests without the rule.
"""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.combinations import make_missing
from benchmarks.files import write_jsonl
from benchmarks.fit_table import FitTable, options, run, split_options
from benchmarks.items import task_line, unique
from benchmarks.smollm2.paths import BUILD, SMOLLM2
from benchmarks.smollm2.skills import instruction
from benchmarks.smollm2.tasks import COUNTS, MAX_NEW_TOKENS, base_answers

UNASKED = BUILD / "tasks" / "unasked.jsonl"


def write_unasked() -> None:
    """The instruction skill's test items with the plain requests as prompts."""
    answers = base_answers(BUILD / "data" / "base-answers.jsonl")["test"]
    items = unique(instruction.items("test", 0, answers), COUNTS["test"])
    lines = [task_line(i, "test", item, MAX_NEW_TOKENS) for i, item in enumerate(items)]
    pairs = zip(lines, items, strict=True)
    write_jsonl(UNASKED, [line | {"prompt": item.contrast} for line, item in pairs])


@click.command()
@options
def main(
    only: str | None, seeds: tuple[int, ...], fit: str, n: int, print_only: bool, record: bool
) -> None:
    """Fit, merge, measure, print."""
    families = [replace(SMOLLM2, seed=seed) for seed in seeds]
    for family in () if print_only else families:
        make_missing(family)
        if not UNASKED.exists():
            write_unasked()
    settings = split_options(fit)
    found = [FitTable(family, settings, {"unasked": UNASKED}, n) for family in families]
    run(found, only, MAX_NEW_TOKENS, print_only=print_only, record=record)


if __name__ == "__main__":
    main()
