"""The YAML block at the head of a model card, changed key by key.

What a person wrote there is text: read and written again, ``language: no`` would come out as
``false`` (Norwegian is a boolean in YAML 1.1), and comments would be lost.
"""

from __future__ import annotations

from typing import Any

import yaml


def with_keys(block: str, changes: dict[str, Any]) -> str:
    """A block in which some keys have new values; every other line stays as it is.

    Args:
        block: a YAML mapping in block style, without the ``---`` lines.
        changes: keys at its top, and what they are to hold (None takes the key away); those that
            are not there come last.

    Raises:
        ValueError: the block is no such mapping, or has anchors that other keys need.
    """
    root = yaml.compose(block, yaml.SafeLoader)
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        raise ValueError("expected one `key: value` a line")
    lines = block.splitlines()
    left = dict(changes)
    for key, value in reversed(root.value if root is not None else []):
        if key.value in left:
            start, end = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
            while end > start + 1 and lines[end - 1].lstrip()[:1] in ("", "#"):
                end -= 1  # a block ends where the next key begins: comments between are not its own
            lines[start : max(end, start + 1)] = _lines(key.value, left.pop(key.value))
    for key, value in left.items():
        lines += _lines(key, value)
    written = "\n".join(lines)
    try:
        yaml.compose(written, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return written


def _lines(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).splitlines()
