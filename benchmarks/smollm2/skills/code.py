"""Small Python functions, each with the assertions that check it.

A family of functions with its parameter is in one split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.items import Item, Split, split_of

WORDS = ("cat", "sun", "tree", "blue", "moon", "fish", "bird", "rain", "snow", "wind", "gold")


@dataclass(frozen=True)
class Family:
    """Functions that differ in a number or word ``n``."""

    name: str
    arguments: str
    meaning: str
    body: str
    inputs: tuple[tuple[Any, ...], ...]
    wants: str = "number"

    def parameters(self) -> tuple[Any, ...]:
        """What ``n`` can be."""
        return tuple(range(2, 40)) if self.wants == "number" else WORDS


NUMBERS = ((0,), (1,), (7,), (-3,), (25,))
LISTS = (([1, 5, 30, 12],), ([50, 2, 2],), ([],), ([9],))
TEXTS = (("abc",), ("",), ("hello world",))
FAMILIES = (
    Family("add_{n}", "x", "returns x plus {n}", "x + {n}", NUMBERS),
    Family("subtract_{n}", "x", "returns x minus {n}", "x - {n}", NUMBERS),
    Family("times_{n}", "x", "returns x multiplied by {n}", "x * {n}", NUMBERS),
    Family("remainder_{n}", "x", "returns the remainder of x divided by {n}", "x % {n}", NUMBERS),
    Family("divide_{n}", "x", "returns x divided by {n}, rounded down", "x // {n}", NUMBERS),
    Family("is_multiple_{n}", "x", "tells whether x is a multiple of {n}", "x % {n} == 0", NUMBERS),
    Family("above_{n}", "x", "tells whether x is greater than {n}", "x > {n}", NUMBERS),
    Family("below_{n}", "x", "tells whether x is less than {n}", "x < {n}", NUMBERS),
    Family("at_least_{n}", "x", "returns the larger of x and {n}", "max(x, {n})", NUMBERS),
    Family("at_most_{n}", "x", "returns the smaller of x and {n}", "min(x, {n})", NUMBERS),
    Family("distance_{n}", "x", "returns the distance of x from {n}", "abs(x - {n})", NUMBERS),
    Family("square_plus_{n}", "x", "returns the square of x plus {n}", "x * x + {n}", NUMBERS),
    Family(
        "sum_plus_{n}", "items", "returns the sum of a list plus {n}", "sum(items) + {n}", LISTS
    ),
    Family(
        "count_above_{n}",
        "items",
        "counts the numbers in a list that are greater than {n}",
        "sum(x > {n} for x in items)",
        LISTS,
    ),
    Family(
        "keep_above_{n}",
        "items",
        "returns the numbers in a list that are greater than {n}",
        "[x for x in items if x > {n}]",
        LISTS,
    ),
    Family(
        "all_times_{n}",
        "items",
        "multiplies every number in a list by {n}",
        "[x * {n} for x in items]",
        LISTS,
    ),
    Family("first_{n}", "items", "returns the first {n} elements of a list", "items[:{n}]", LISTS),
    Family("last_{n}", "items", "returns the last {n} elements of a list", "items[-{n}:]", LISTS),
    Family("repeat_{n}", "text", "repeats a text {n} times", "text * {n}", TEXTS),
    Family("shorten_{n}", "text", "returns the first {n} letters of a text", "text[:{n}]", TEXTS),
    Family(
        "longer_than_{n}",
        "text",
        "tells whether a text has more than {n} letters",
        "len(text) > {n}",
        TEXTS,
    ),
    Family("add_{n}", "text", 'appends "{n}" to a text', 'text + "{n}"', TEXTS, "word"),
    Family("put_{n}", "text", 'puts "{n}" before a text', '"{n}" + text', TEXTS, "word"),
    Family(
        "has_{n}", "text", 'tells whether a text contains "{n}"', '"{n}" in text', TEXTS, "word"
    ),
    Family(
        "count_{n}",
        "text",
        'counts how often "{n}" occurs in a text',
        'text.count("{n}")',
        (("a cat and a cat",), ("",), ("blue moon",)),
        "word",
    ),
)


def solve(family: Family, n: Any) -> str:
    """The function's source."""
    body = family.body.format(n=n)
    return f"def {family.name.format(n=n)}({family.arguments}):\n    return {body}"


def telling_inputs(family: Family, n: Any) -> tuple[tuple[Any, ...], ...]:
    """Inputs on which a function with another ``n`` answers otherwise."""
    if family.wants == "word":
        return ((f"the {n} here",), (f"{n} and {n}",))
    if family.arguments == "items":
        return (([n - 1, n, n + 1],), (list(range(1, n + 4)),))
    if family.arguments == "text":
        return tuple((("abcdefghij" * 5)[:length],) for length in (n - 1, n, n + 1, n + 3))
    return ((n - 1,), (n,), (n + 1,), (2 * n,), (3 * n - 1,))


def assertions(family: Family, n: Any) -> list[str]:
    """Lines that hold for a right function."""
    name = family.name.format(n=n)
    right: Callable[..., Any] = eval(f"lambda {family.arguments}: {family.body.format(n=n)}")
    inputs = family.inputs + telling_inputs(family, n)
    return [
        f"assert {name}({', '.join(map(repr, given))}) == {right(*given)!r}" for given in inputs
    ]


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"code/{split}/{seed}")
    while True:
        family = rng.choice(FAMILIES)
        n = rng.choice(family.parameters())
        key = f"{family.name}({family.arguments}) {n}"
        if split_of(key) != split:
            continue
        head = f"{family.name.format(n=n)}({family.arguments})"
        yield Item(
            prompt=f"Write a Python function {head} that {family.meaning.format(n=n)}.",
            response=solve(family, n),
            checker="code",
            key=key,
            fields={"tests": assertions(family, n)},
        )
