"""What a skill is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "score", "valid", "test"]


@dataclass(frozen=True)
class Item:
    """One request with the answer that the expert learns, and the keys its checker reads.

    ``key`` is what the item is about: items of one key share a split. ``contrast`` is the same
    request without the instruction, where there is one.
    """

    prompt: str
    response: str
    checker: str
    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    contrast: str | None = None


def split_of(key: str) -> Split:
    """5/8 train, 1/8 each of score, valid and test, by a hash of the key."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 8
    names: dict[int, Split] = {0: "score", 1: "valid", 2: "test"}
    return names.get(bucket, "train")
