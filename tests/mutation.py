"""Hostile variants of files: what a careless editor, a bad disk or an attacker makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

HOSTILE_TEXTS = (
    "", "\0", "\x1b[31m", "\ud800", "a\nb", "../../../../etc/passwd", "/etc/passwd", "~",
    "hf://a/b/c", "x" * 5000, "NaN", "1" * 5000, "<script>alert(1)</script>",
    "model.layers.99.mlp.up_proj.weight",
    "model.layers.-1.x", "share", "kl", "head", "日本語", "{{ 7*7 }}", "%s%n", "model.norm.weight",
)  # fmt: skip
HOSTILE_VALUES: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 0,
    lambda: 1,
    lambda: 2,
    lambda: 2**31,
    lambda: 2**60,
    lambda: 10**400,
    lambda: 0.5,
    lambda: -0.0,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: [],
    lambda: {},
    lambda: [[]],
    lambda: {"a": {"b": None}},
    lambda: list(range(200)),
    lambda: deep(80),
)


def deep(levels: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four flips, cuts, doublings, insertions and overwritings."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data)) if data else 0
        length = rng.choice((1, 1, 2, 8, 64, 1000))
        what = rng.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            del data[at : at + length]
        elif what == 3:
            data[at:at] = data[at : at + length]
        elif what == 4:
            data[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"[" * 500))
        else:
            data[at : at + 8] = rng.choice((0, 1, 2**31, 2**60, 2**63, 2**64 - 1)).to_bytes(
                8, "little"
            )
    return bytes(data)


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three of its parts changed."""
    root = [json.loads(json.dumps(tree))]
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _places(root, places)
        holder, key = rng.choice(places)
        what = rng.randrange(8)
        if what <= 3:
            holder[key] = _hostile(rng)
        elif what == 4:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        elif what == 5 and holder is not root:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice((key + "x", *HOSTILE_TEXTS))] = _hostile(rng)
        elif holder is not root:
            holder.insert(key, json.loads(json.dumps(holder[key])))
    return root[0]


def _hostile(rng: random.Random) -> Any:
    return rng.choice(HOSTILE_TEXTS) if rng.random() < 0.4 else rng.choice(HOSTILE_VALUES)()


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _places(value[key], found)


def with_repeated_key(text: str, rng: random.Random) -> str:
    """JSON in which some object's first key stands twice."""
    starts = [i for i, c in enumerate(text) if c == "{" and text[i + 1 : i + 2] == '"']
    if not starts:
        return text
    start = rng.choice(starts) + 1
    end = text.index('":', start) + 2
    return text[:start] + text[start:end] + "1, " + text[start:]


def safetensors_bytes(metadata: dict[str, str], tensors: dict[str, Any], data: bytes) -> bytes:
    """A file with any header: ``tensors`` are its entries as the format writes them."""
    header = json.dumps({"__metadata__": metadata, **tensors}).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data
