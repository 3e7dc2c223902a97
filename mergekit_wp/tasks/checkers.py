"""What counts as a right answer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import UserError, option
from mergekit_wp.tasks import ifeval

_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
#: an item's own line, and what the model wrote: a score, or whether it is right
Checker = Callable[[dict[str, Any], str], float | bool]


def exact(item: dict[str, Any], output: str) -> bool:
    """The answer, or one of the answers, and nothing else but white space around it."""
    return output.strip() in [answer.strip() for answer in _answers(item)]


def contains(item: dict[str, Any], output: str) -> bool:
    """The answer, or one of the answers, somewhere in the output."""
    return any(answer in output for answer in _answers(item))


def number(item: dict[str, Any], output: str) -> bool:
    """The last number of the output is the answer, or one of the answers.

    Thousands' commas do not matter, and of an answer as GSM8K writes it ("... #### 18") what
    follows the last ``####`` counts.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)
    return bool(found) and float(found[-1].replace(",", "")) in map(_gold, _answers(item))


def regex(item: dict[str, Any], output: str) -> bool:
    """The item's ``pattern`` is found in the output."""
    return re.search(item["pattern"], output) is not None


def follows(item: dict[str, Any], output: str) -> bool:
    """Every IFEval instruction of the item is followed."""
    kwargs = item.get("kwargs") or [{}] * len(item["instruction_id_list"])
    return all(ifeval.follows(item["instruction_id_list"], kwargs, output))


def _answers(item: dict[str, Any]) -> list[str]:
    """The right answers as text.

    Raises:
        ValueError: they are no texts or numbers.
    """
    answer = item["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    if not answers:
        raise ValueError("'answer' is an empty list; give one right answer or more")
    for one in answers:
        usual = isinstance(one, str | int | float) and not isinstance(one, bool)
        if not usual or one in (math.inf, -math.inf) or one != one:
            raise ValueError(
                f"'answer' holds {json.dumps(one):.60}, which no model writes; give the text that "
                "is right, or a list of texts of which each is right"
            )
    return [str(one) for one in answers]


def _gold(answer: str) -> float:
    text = answer.rpartition("####")[2].strip()
    try:
        value = float(text.replace(",", "") if _GROUPED.fullmatch(text) else text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"'answer' is {answer!r:.60}, which is no number such as 18, 2,125 or -0.5 (nor ends "
            "in one after '####')"
        )
    return value


def _check_number(item: dict[str, Any]) -> None:
    for answer in _answers(item):
        _gold(answer)


def _check_regex(item: dict[str, Any]) -> None:
    try:
        re.compile(item["pattern"])
    except (TypeError, re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"'pattern' is {item['pattern']!r:.60}, which is no regular expression: {error}"
        ) from error


def _check_ifeval(item: dict[str, Any]) -> None:
    names, kwargs = item["instruction_id_list"], item.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError("'instruction_id_list' must be a list of IFEval's names")
    if kwargs and not (isinstance(kwargs, list) and all(isinstance(k, dict) for k in kwargs)):
        raise ValueError("'kwargs' must be a list with one object for each instruction")
    try:
        follows(item, "A text of some words")  # what does not fit an instruction fails on any text
    except UserError as error:
        raise ValueError(str(error)) from error


def _check_contains(item: dict[str, Any]) -> None:
    if not all(answer.strip() for answer in _answers(item)):
        raise ValueError("'answer' is empty, which every output contains; give a text of its own")


BUILT_IN: dict[str, Checker] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "regex": regex,
    "ifeval": follows,
}
#: what a built-in checker raises where an item's answer or pattern is none
_UNFIT = (UserError, ValueError, re.error)
#: what an item of theirs must fulfil, so that no output can make them fail; ValueErrors
_CHECKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "contains": _check_contains,
    "exact": _answers,
    "number": _check_number,
    "regex": _check_regex,
    "ifeval": _check_ifeval,
}
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

    def check(self, item: dict[str, Any]) -> None:
        """Look at what an item's built-in checker will read; a user's own are not known.

        Raises:
            ValueError: unknown checker, or a key is missing or cannot be used.
        """
        name = item["checker"]
        if not isinstance(name, str) or name not in self.known:
            raise ValueError(
                f"unknown checker {name!r:.60}; known are {', '.join(self.known)}; others come "
                f"from {option('checkers', 'FILE.py')}"
            )
        if self.known[name] is not BUILT_IN.get(name):
            return  # of a user's file, which may have taken the name
        for key in NEEDS[name]:
            if key not in item:
                raise ValueError(f"checker '{name}' needs '{key}'")
        _CHECKS[name](item)

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
