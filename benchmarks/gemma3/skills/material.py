"""Names, cities and days, as people write them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Karen"),
    *("Leo", "Maria", "Nina", "Oscar", "Paula", "Robert", "Sara", "Tom", "Victor", "Walter", "Zoe"),
)
CITIES = (
    *("Oslo", "Paris", "Rome", "Berlin", "Madrid", "London", "Vienna", "Lisbon", "Athens", "Tokyo"),
    *("Cairo", "Lima", "Boston", "Chicago", "Dublin", "Prague", "Moscow", "Seoul", "Delhi"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WRITTEN = ("{day} {month} {year}", "{month} {day}, {year}")
FIRST, DAYS = date(1900, 1, 1), 365 * 150


@dataclass(frozen=True)
class Day:
    """A day, and one way of writing it."""

    day: date
    written: str

    @classmethod
    def draw(cls, rng: random.Random) -> Day:
        """One at random."""
        day, form = FIRST + timedelta(rng.randrange(DAYS)), rng.choice(WRITTEN)
        return cls(day, form.format(day=day.day, month=MONTHS[day.month - 1], year=day.year))
