"""A sentence about somebody, to be written as a JSON object. Name and age are in one split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from benchmarks.items import Item, Split, split_of

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Karen"),
    *("Leo", "Maria", "Nina", "Oscar", "Paula", "Robert", "Sara", "Tom", "Victor", "Walter", "Zoe"),
)
CITIES = (
    *("Oslo", "Paris", "Rome", "Berlin", "Madrid", "London", "Vienna", "Lisbon", "Athens", "Tokyo"),
    *("Cairo", "Lima", "Boston", "Chicago", "Dublin", "Prague", "Moscow", "Seoul", "Delhi"),
)
TOLD = (
    "{name}, {age}, from {city}",
    "{name} of {city} at {age}",
    "{city}'s {name}, aged {age}",
)


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"records/{split}/{seed}")
    while True:
        name, city, age = rng.choice(NAMES), rng.choice(CITIES), rng.randint(18, 90)
        told = rng.choice(TOLD).format(name=name, city=city, age=age)
        if split_of(f"{name} {age}") != split:
            continue
        record = {"name": name, "age": age, "city": city}
        yield Item(
            prompt=f"Write {told} as a record.\nAnswer:",
            response=f" {json.dumps(record)}",
            checker="record",
            key=f"{name} {age}",
            fields={"answer": record},
        )
