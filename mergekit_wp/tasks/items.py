"""Tasks in JSONL files: a prompt, and what its answer is checked against.

A line is ``{"prompt": ..., "split": "valid" or "test", "checker": name, ...}`` with the keys that
the checker reads (``answer`` for ``exact``, which is the default), and optionally ``id`` and
``max_new_tokens``. Parameters are chosen on validation items and reported on test items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import complaint, parse_json, read_lines
from mergekit_wp.models.encoding import TextLength, encode_prompt, too_long
from mergekit_wp.models.generation import TextInterface, greedy
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import Text
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split

_SPLITS = ("valid", "test")
_TEXT: TypeAdapter[Text] = TypeAdapter(Text)
#: sequences and tokens of a batch, on the CPU and elsewhere
_BATCH = {"cpu": (256, 16_384), "cuda": (512, 131_072)}


@dataclass(frozen=True)
class JsonlTask:
    """A task file, read and checked."""

    name: str
    fingerprint: str
    items: tuple[dict[str, Any], ...]
    checkers: Checkers
    max_new_tokens: int
    batch_size: int | None

    @classmethod
    def read(
        cls,
        path: Path,
        checkers: Checkers,
        *,
        name: str | None = None,
        max_new_tokens: int = 64,
        batch_size: int | None = None,
    ) -> JsonlTask:
        """Read a task file.

        Raises:
            UserError: unreadable, empty, or a line that cannot be used; names the line and key.
        """
        content, lines = read_lines(path, f"task file {path}")
        items: list[dict[str, Any]] = []
        seen: set[str] = set()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"task file {path}, line {number}"
            item = _parse(line, where, checkers)
            item["id"] = str(item.get("id", number))
            if item["id"] in seen:
                raise UserError(f"{where}: id '{item['id']}' stands twice")
            seen.add(item["id"])
            items.append(item)
        if not items:
            raise UserError(
                f"task file {path} holds no items; expected lines such as "
                '{"prompt": "...", "answer": "...", "split": "test"}'
            )
        digest = hashlib.sha256(content + checkers.fingerprint.encode())
        digest.update(str(max_new_tokens).encode())
        return cls(
            name or path.stem,
            digest.hexdigest(),
            tuple(items),
            checkers,
            max_new_tokens,
            batch_size,
        )

    def of(self, split: Split) -> list[dict[str, Any]]:
        """The items of a split, in the file's order."""
        return [item for item in self.items if item["split"] == split]

    def count(self, split: Split) -> int:
        """Items of a split."""
        return len(self.of(split))

    def too_long(self, model: Any, tokenizer: Any) -> str | None:
        """What to say of items longer than a model was made for, None where none is.

        Raises:
            UserError: the model has no positions for one.
        """
        texts = [
            TextLength(
                f"task '{self.name}': item {item['id']}",
                len(encode_prompt(tokenizer, item["prompt"])),
                self._length(item),
            )
            for item in self.items
        ]
        return too_long(model, texts, "the model")

    def _length(self, item: dict[str, Any]) -> int:
        return int(item.get("max_new_tokens", self.max_new_tokens))

    def evaluate(
        self,
        model: Any,
        asked: TextInterface,
        split: Split,
        at_once: AtOnce | None = None,
    ) -> list[ItemScore]:
        """Greedy answers, checked.

        An answer that was cut at its last token never ended, so it is no ``exact`` answer.

        Raises:
            UserError: a checker fails.
            OutOfMemory: there is not even memory for one sequence.
        """
        items = self.of(split)
        outputs = answers(
            model,
            asked,
            [item["prompt"] for item in items],
            [self._length(item) for item in items],
            self.batch_size,
            at_once,
        )
        scores = []
        for item, (text, ended) in zip(items, outputs, strict=True):
            cut = item["checker"] == "exact" and not ended
            score = 0.0 if cut else self.checkers.judge(item, text)
            scores.append(ItemScore(item["id"], score, text))
        return scores


def answers(
    model: Any,
    asked: TextInterface,
    prompts: Sequence[Text],
    max_new_tokens: Sequence[int],
    batch_size: int | None = None,
    at_once: AtOnce | None = None,
) -> list[tuple[str, bool]]:
    """Each prompt's greedy answer, and whether the model ended it itself.

    Args:
        model: a causal LM of transformers.
        asked: how it is asked; the chat template is applied where there is one.
        prompts: texts or chat messages.
        max_new_tokens: longest answer of each.
        batch_size: sequences at once; None for a size that fits the device.
        at_once: bounds them further, and goes on with fewer where memory runs out; None does not.

    Raises:
        OutOfMemory: there is not even memory for one sequence.
    """
    tokenizer, ends = asked.tokenizer, asked.ends
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (max_new_tokens[i], len(encoded[i])))
    found: dict[int, tuple[str, bool]] = {}
    rows, tokens = _BATCH["cpu" if model.device.type == "cpu" else "cuda"]
    start = 0
    while start < len(order):
        budget = max_new_tokens[order[start]]
        size = 0
        while start + size < len(order) and max_new_tokens[order[start + size]] == budget:
            longest = len(encoded[order[start + size]]) + budget
            most = batch_size or min(rows, max(1, tokens // longest))
            if size and size >= (min(most, at_once.size) if at_once else most):
                break
            size += 1
        members = order[start : start + size]
        continued = partial(
            greedy, model, [encoded[i] for i in members], budget, ends, model.device
        )
        rows_out = at_once.run(continued, size) if at_once else continued(size)
        for i, ids in zip(members, rows_out, strict=True):
            ended = bool(ids) and ids[-1] in ends
            found[i] = (tokenizer.decode(ids, skip_special_tokens=True), ended)
        start += size
    return [found[i] for i in range(len(prompts))]


def _parse(line: str, where: str, checkers: Checkers) -> dict[str, Any]:
    try:
        item = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object with 'prompt' and 'split'")
    try:
        item["prompt"] = _TEXT.validate_python(item.get("prompt"))
    except ValidationError as error:
        raise UserError(
            f"{where}: 'prompt' must be a text or chat messages ({complaint(error)})"
        ) from error
    if not item["prompt"]:
        raise UserError(f"{where}: 'prompt' is empty")
    if item.get("split") not in _SPLITS:
        raise UserError(
            f"{where}: 'split' is {item.get('split')!r}; write \"valid\" for items that "
            'parameters are chosen on, "test" for those that are reported'
        )
    item.setdefault("checker", "exact")
    try:
        checkers.check(item)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(item.get("id", 0), str | int) or isinstance(item.get("id"), bool):
        raise UserError(f"{where}: 'id' must be a text or a whole number")
    longest = item.get("max_new_tokens", 1)
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise UserError(f"{where}: 'max_new_tokens' must be a whole number from 1")
    return item
