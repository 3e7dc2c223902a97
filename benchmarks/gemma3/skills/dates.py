"""Days as people write them, to be written as ISO 8601 has them. A day is in one split."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.gemma3.skills.material import Day
from benchmarks.items import Item, Split, split_of


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"dates/{split}/{seed}")
    while True:
        day = Day.draw(rng)
        key = day.day.isoformat()
        if split_of(key) == split:
            yield Item(
                prompt=f"Write {day.written} as a date.\nAnswer:",
                response=f" {key}",
                checker="exact",
                key=key,
                fields={"answer": key},
            )
