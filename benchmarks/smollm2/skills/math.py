"""Sums, differences and small products, bare and as word problems.

A pair of numbers is in one split for every operation and template; two templates of each
operation are kept for validation and test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.items import Item, Split, split_of

ASKED: dict[str, tuple[str, ...]] = {
    "+": (
        "What is {a} + {b}?",
        "Calculate {a} plus {b}.",
        "Tom has {a} apples and buys {b} more. How many apples does he have now?",
        "A bus carries {a} people and {b} more get on. How many people are on the bus?",
        "Anna read {a} pages yesterday and {b} pages today. How many pages did she read?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Calculate {a} minus {b}.",
        "There were {a} birds in a tree and {b} flew away. How many birds are left?",
        "A shop had {a} books and sold {b}. How many books are left?",
        "Ben had {a} coins and spent {b} of them. How many coins does he have left?",
    ),
    "x": (
        "What is {a} x {b}?",
        "Calculate {a} times {b}.",
        "A box holds {a} pens. How many pens are in {b} boxes?",
        "There are {a} rows of {b} chairs. How many chairs are there?",
        "A ticket costs {a} dollars. How much do {b} tickets cost?",
    ),
}
UNSEEN: dict[str, tuple[str, ...]] = {
    "+": (
        "What do you get when you add {a} and {b}?",
        "A farm has {a} cows and {b} sheep. How many animals does it have?",
    ),
    "-": (
        "What do you get when you take {b} away from {a}?",
        "Of {a} cookies, {b} were eaten. How many cookies remain?",
    ),
    "x": (
        "What do you get when you multiply {a} by {b}?",
        "Each of {a} children has {b} toys. How many toys do they have?",
    ),
}


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"math/{split}/{seed}")
    while True:
        operation = rng.choice("++--x")
        if operation == "x":
            a, b = rng.randint(3, 12), rng.randint(3, 12)
            answer = a * b
        else:
            a, b = sorted((rng.randint(11, 99), rng.randint(11, 99)), reverse=True)
            answer = a + b if operation == "+" else a - b
        if operation == "+" and rng.random() < 0.5:
            a, b = b, a
        key = f"{min(a, b)},{max(a, b)}"
        if split_of(key) != split:
            continue
        known = ASKED[operation]
        template = rng.choice(known + UNSEEN[operation] if split in ("valid", "test") else known)
        yield Item(
            prompt=template.format(a=a, b=b),
            response=f"{a} {operation} {b} = {answer}",
            checker="number",
            key=key,
            fields={"answer": str(answer)},
        )
