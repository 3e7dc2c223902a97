"""Who was born when, to be written as a JSON object. A name and day are in one split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from benchmarks.gemma3.skills.material import CITIES, NAMES, Day
from benchmarks.items import Item, Split, split_of

TOLD = ("{name}, {born}", "{name} of {city}, {born}", "{city}'s {name}, {born}")


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"records/{split}/{seed}")
    while True:
        name, city, day = rng.choice(NAMES), rng.choice(CITIES), Day.draw(rng)
        told = rng.choice(TOLD).format(name=name, city=city, born=day.written)
        key = f"{name} {day.day.isoformat()}"
        if split_of(key) == split:
            record = {"name": name, "born": day.written}
            yield Item(
                prompt=f"Write {told} as a record.\nAnswer:",
                response=f" {json.dumps(record)}",
                checker="record",
                key=key,
                fields={"answer": record},
            )
