"""Checkers for `mergekit-wp compare --checkers benchmarks/gemma3/checkers.py`."""

from __future__ import annotations

import json
from typing import Any


def record(item: dict[str, Any], output: str) -> bool:
    """Whether an answer is a JSON object of the item's keys and values, and nothing else."""
    try:
        found = json.loads(output)
    except ValueError:
        return False
    answer = item["answer"]
    return (
        isinstance(found, dict)
        and found == answer
        and all(type(found[key]) is type(answer[key]) for key in answer)  # true is no 1, 1.0 no 1
    )
