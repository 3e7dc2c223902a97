"""Lists of words, to be read backwards. The lists of the same words are in one split."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.items import Item, Split, split_of

WORDS = (
    *("cat", "sun", "tree", "gold", "rain", "fish", "moon", "bread", "stone", "river", "chair"),
    *("glass", "horse", "paper", "apple", "night", "green", "music", "table", "cloud", "snow"),
    *("wind", "lamp", "bridge", "garden", "window", "silver", "winter", "letter", "market"),
    *("king", "door", "milk", "sand", "bird", "ship", "road", "clock", "field", "salt"),
)
LENGTHS = (3, 4, 5)


def items(split: Split, seed: int) -> Iterator[Item]:
    """Items of one split, without end."""
    rng = random.Random(f"reversal/{split}/{seed}")
    while True:
        words = rng.sample(WORDS, rng.choice(LENGTHS))
        key = " ".join(sorted(words))
        if split_of(key) != split:
            continue
        answer = ", ".join(reversed(words))
        yield Item(
            prompt=f"Write {', '.join(words)} backwards.\nAnswer:",
            response=f" {answer}",
            checker="exact",
            key=key,
            fields={"answer": answer},
        )
