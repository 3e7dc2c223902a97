"""Reading text that strangers wrote: manifests, prompts and recipes travel over the Hub.

JSON and YAML are read with their ambiguities refused (a key that stands twice; in YAML, which
people write, with two values) and their size bounded before anything is built from them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

#: bytes of a YAML text, and nodes it may stand for once its aliases are followed
YAML_BYTES, YAML_NODES = 2**20, 100_000
# what PyYAML's constructors raise for a scalar that is not of the type it claims, beside YAMLError
_SCALAR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class StrictModel(BaseModel):
    """What a file states: no other keys, finite numbers, and it stays as it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_json(text: str | bytes) -> Any:
    """JSON in which no object holds a key twice, and every text can be written in UTF-8.

    Raises:
        ValueError: what is wrong, on one line.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no character") from None
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {_shown(key)} stands twice")
        found[key] = value
    return found


def _shown(text: object) -> str:
    return f"{text!r:.80}"


def parse_yaml(text: str) -> Any:
    """One YAML document in which no key has two values; anchors and aliases may be used.

    Aliases cost nothing to read but everything to walk: nine lines can stand for a billion nodes.
    So the document is counted, aliases followed, before Python objects are built from it.

    Raises:
        ValueError: what is wrong, on one line.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"it has {len(text)} characters, more than {YAML_BYTES}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _count(node, {})) > YAML_NODES:
            raise ValueError(f"its aliases stand for {count:.3g} values, more than {YAML_NODES}")
        _refuse_two_values(node, set())
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except _SCALAR_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes that a node stands for, itself among them."""
    if not isinstance(node, yaml.CollectionNode):
        if "\0" in node.value:  # no path has one, and the C library ends there
            raise ValueError(f"a NUL character stands at line {node.start_mark.line + 1}")
        return 1
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias stands within what it names")
        return count
    known[id(node)] = None
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(part, known) for part in parts)
    known[id(node)] = total
    return total


def _refuse_two_values(node: yaml.Node, seen: set[int]) -> None:
    """Refuse a key that stands twice with different values; of a counted document."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        given: dict[tuple[str, str], yaml.Node] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = given.setdefault((key.tag, key.value), value)
                if not _same(first, value):
                    line = node.start_mark.line + 1
                    raise ValueError(
                        f"key {_shown(key.value)} stands twice, with different values, in the "
                        f"mapping at line {line}; keep one"
                    )
        parts = [part for pair in node.value for part in pair]
    for part in parts:
        _refuse_two_values(part, seen)


def _same(one: Any, other: Any) -> bool:
    """Whether two nodes, or parts of nodes, say the same, in whatever style."""
    if one is other:
        return True
    if isinstance(one, yaml.Node):
        alike = isinstance(other, yaml.Node) and one.tag == other.tag
        return alike and _same(one.value, other.value)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def complaint(error: ValidationError) -> str:
    """The first thing pydantic complains of, as ``where: what``."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where!s:.120}: {first['msg']}" if where else str(first["msg"])
