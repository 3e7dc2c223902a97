"""Dates as people write them, to be written as ISO 8601 has them. A date is in one split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, timedelta

from benchmarks.items import Item, Split, split_of

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WRITTEN = ("{day} {month} {year}", "{month} {day}, {year}", "the {day}. of {month} {year}")
FIRST, DAYS = date(1900, 1, 1), 365 * 150


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"dates/{split}/{seed}")
    while True:
        day = FIRST + timedelta(rng.randrange(DAYS))
        form = rng.choice(WRITTEN)
        if split_of(day.isoformat()) != split:
            continue
        written = form.format(day=day.day, month=MONTHS[day.month - 1], year=day.year)
        yield Item(
            prompt=f"Write {written} as a date.\nAnswer:",
            response=f" {day.isoformat()}",
            checker="exact",
            key=day.isoformat(),
            fields={"answer": day.isoformat()},
        )
