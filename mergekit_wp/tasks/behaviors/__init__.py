"""Built-in behaviours: pairs of requests with and without an instruction, and items to check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.prompts import Prompt, PromptSet

#: of the requests, one in three is kept for items; prompts and items share none
_EVERY = 3


class Behavior(BaseModel):
    """One constraint on an answer that a rule of `ifeval` can check.

    ``wordings`` are ways to ask for it; the last is for items only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    says: str
    instruction_id: str
    kwargs: dict[str, Any]
    wordings: tuple[str, ...]

    def prompts(self) -> Iterator[dict[str, str]]:
        """Lines of a prompt file: the request with the instruction, and without as contrast."""
        for i, request in enumerate(_requests(for_items=False)):
            wording = self.wordings[i % (len(self.wordings) - 1)]
            yield {"prompt": f"{request} {wording}", "contrast": request}

    def items(self) -> Iterator[dict[str, Any]]:
        """Lines for `mergekit-wp compare` and `verify`, every second one for validation."""
        for i, request in enumerate(_requests(for_items=True)):
            yield {
                "id": str(i),
                "prompt": f"{request} {self.wordings[-1]}",
                "split": ("test", "valid")[i % 2],
                "checker": "ifeval",
                "instruction_id_list": [self.instruction_id],
                "kwargs": [self.kwargs],
            }


@lru_cache
def behaviors() -> dict[str, Behavior]:
    """All built-in behaviours by name."""
    data = yaml.safe_load((resources.files(__name__) / "instructions.yml").read_text("utf-8"))
    return {name: Behavior.model_validate(entry) for name, entry in data.items()}


def behavior(name: str) -> Behavior:
    """One built-in behaviour.

    Raises:
        UserError: no such name; lists those there are.
    """
    if name not in behaviors():
        raise UserError(f"no built-in behaviour '{name}'; there are {', '.join(behaviors())}")
    return behaviors()[name]


def export(name: str, prompts: Path | None, items: Path | None) -> list[Path]:
    """Write the files of a built-in behaviour, and say which were written.

    Args:
        name: of the behaviour.
        prompts: its prompt file; None for none.
        items: the items that check it.

    Raises:
        UserError: no such behaviour.
    """
    chosen, written = behavior(name), []
    for path, lines in ((prompts, chosen.prompts()), (items, chosen.items())):
        if path is not None:
            with written_whole(path) as temporary:
                temporary.write_text(jsonl(lines), encoding="utf-8")
            written.append(path)
    return written


def jsonl(lines: Iterator[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def plain_text() -> PromptSet:
    """Prose, talk, requests, code and other languages, of our own writing: what a base can do.

    One paragraph each; read as it stands, through no chat template.
    """
    text = (resources.files(__name__) / "plain.txt").read_text("utf-8")
    pieces = tuple(Prompt(prompt=piece.strip()) for piece in text.split("\n\n"))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return PromptSet(pieces, sha256, "the built-in plain text", "plain-text", raw=True)


def _requests(for_items: bool) -> list[str]:
    text = (resources.files(__name__) / "requests.txt").read_text("utf-8")
    every = text.splitlines()
    return [r for i, r in enumerate(every) if (i % _EVERY == _EVERY - 1) is for_items]
