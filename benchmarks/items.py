"""What skills are made of, and the files that are written of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from benchmarks.files import write_jsonl

Split = Literal["train", "score", "valid", "test"]
#: a split and a seed to its items, without end
Stream = Callable[[Split, int], Iterator["Item"]]


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


def unique(stream: Iterator[Item], count: int) -> list[Item]:
    """The first ``count`` items whose prompts differ."""
    found: dict[str, Item] = {}
    for item in islice(stream, 100 * count):
        found.setdefault(item.prompt, item)
        if len(found) == count:
            break
    return list(found.values())


def task_line(number: int, split: Split, item: Item, max_new_tokens: int) -> dict[str, Any]:
    """One line for `mergekit-wp compare`."""
    return {
        "id": f"{split}-{number}",
        "prompt": item.prompt,
        "split": split,
        "checker": item.checker,
        "max_new_tokens": max_new_tokens,
        **item.fields,
    }


def write_skill(
    name: str, stream: Stream, out: Path, counts: Mapping[Split, int], max_new_tokens: int
) -> None:
    """Write one skill's files into a folder.

    - ``data/NAME.jsonl``: training pairs
    - ``prompts/NAME.jsonl``: prompts for `mergekit-wp score` and `mergekit-wp fit`
    - ``tasks/NAME.jsonl``: items for `mergekit-wp compare`, validation and test
    """
    by_split = {split: unique(stream(split, 0), count) for split, count in counts.items()}
    pairs = [{"prompt": i.prompt, "response": i.response} for i in by_split["train"]]
    write_jsonl(out / "data" / f"{name}.jsonl", pairs)
    prompts = [
        {"prompt": i.prompt, "response": i.response}
        | ({"contrast": i.contrast} if i.contrast else {})
        for i in by_split["score"]
    ]
    write_jsonl(out / "prompts" / f"{name}.jsonl", prompts)
    splits: tuple[Split, ...] = ("valid", "test")
    lines = [
        task_line(number, split, item, max_new_tokens)
        for split in splits
        for number, item in enumerate(by_split[split])
    ]
    write_jsonl(out / "tasks" / f"{name}.jsonl", lines)
