"""What counts as a right answer."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import UserError, option
from mergekit_wp.tasks import ifeval

#: an item's own line, and what the model wrote: a score, or whether it is right
Checker = Callable[[dict[str, Any], str], float | bool]


def exact(item: dict[str, Any], output: str) -> bool:
    """The answer, and nothing else but white space around it."""
    return output.strip() == str(item["answer"]).strip()


def contains(item: dict[str, Any], output: str) -> bool:
    """The answer somewhere in the output."""
    return str(item["answer"]) in output


def number(item: dict[str, Any], output: str) -> bool:
    """The last number of the output is the answer; thousands' commas do not matter."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)
    return bool(found) and float(found[-1].replace(",", "")) == float(item["answer"])


def regex(item: dict[str, Any], output: str) -> bool:
    """The item's ``pattern`` is found in the output."""
    return re.search(item["pattern"], output) is not None


def follows(item: dict[str, Any], output: str) -> bool:
    """Every IFEval instruction of the item is followed."""
    kwargs = item.get("kwargs") or [{}] * len(item["instruction_id_list"])
    return all(ifeval.follows(item["instruction_id_list"], kwargs, output))


BUILT_IN: dict[str, Checker] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "regex": regex,
    "ifeval": follows,
}
#: what a built-in checker raises where an item's answer or pattern is none
_UNFIT = (UserError, ValueError, re.error)
#: keys without which a checker has nothing to compare with
NEEDS = {
    "exact": ("answer",),
    "contains": ("answer",),
    "number": ("answer",),
    "regex": ("pattern",),
    "ifeval": ("instruction_id_list",),
}


@dataclass(frozen=True)
class Checkers:
    """The built-in checkers and those of a user's file."""

    known: Mapping[str, Checker]
    fingerprint: str

    @classmethod
    def load(cls, path: Path | None) -> Checkers:
        """Add the functions of a Python file; only the command line can name one, never data.

        Raises:
            UserError: the file cannot be read or run.
        """
        if path is None:
            return cls(BUILT_IN, "")
        spec = importlib.util.spec_from_file_location("mergekit_wp_checkers", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UserError(f"{option('checkers', path)}: no such Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"{option('checkers', path)} fails when it is run: {type(error).__name__}: {error}"
            ) from error
        own = {
            name: value
            for name, value in vars(module).items()
            if callable(value)
            and not name.startswith("_")
            and getattr(value, "__module__", "") == module.__name__
        }
        return cls(BUILT_IN | own, hashlib.sha256(path.read_bytes()).hexdigest())

    def judge(self, item: dict[str, Any], output: str) -> float:
        """Score one output.

        Raises:
            UserError: the checker fails on it.
        """
        name = item["checker"]
        checker = self.known[name]
        try:
            return float(checker(item, output))
        except Exception as error:
            if checker in BUILT_IN.values() and not isinstance(error, _UNFIT):
                raise  # a bug of ours, not of an item or a user's file
            raise UserError(
                f"checker '{name}' fails on item {item['id']}: {type(error).__name__}: {error}"
            ) from error
