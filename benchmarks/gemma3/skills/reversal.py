"""Lists to be read backwards: names, cities, months, numbers. Lists of one set are in one split."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.gemma3.skills.material import CITIES, MONTHS, NAMES
from benchmarks.items import Item, Split, split_of

ENTRIES = (*NAMES, *CITIES, *MONTHS, *map(str, range(1, 32)))
LENGTHS = (3, 4, 5)


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"reversal/{split}/{seed}")
    while True:
        entries = rng.sample(ENTRIES, rng.choice(LENGTHS))
        key = " ".join(sorted(entries))
        if split_of(key) == split:
            answer = ", ".join(reversed(entries))
            yield Item(
                prompt=f"Write {', '.join(entries)} backwards.\nAnswer:",
                response=f" {answer}",
                checker="exact",
                key=key,
                fields={"answer": answer},
            )
