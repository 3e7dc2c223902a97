"""Items: a prompt, and what its answer is checked against.

They are read as prompts are, from any source: ``prompt``, ``split`` ("valid" or "test"), the name
of a ``checker`` with the keys that it reads (``answer`` for ``exact``, which is the default), and
optionally ``id`` and ``max_new_tokens``. Parameters are chosen on validation items and reported on
test items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.untrusted import complaint
from mergekit_wp.models.encoding import TextLength, encode_prompt, too_long
from mergekit_wp.models.generation import TextInterface, greedy
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.offloaded import device_of
from mergekit_wp.prompts import Text
from mergekit_wp.prompts.location import Location
from mergekit_wp.prompts.read import take
from mergekit_wp.prompts.records import read_records
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split

_SPLITS = ("valid", "test")
_TEXT: TypeAdapter[Text] = TypeAdapter(Text)
#: sequences and tokens of a batch, on the CPU and elsewhere
AT_ONCE = {"cpu": (256, 16_384), "cuda": (512, 131_072)}


@dataclass(frozen=True)
class JsonlTask:
    """Items, read and checked; ``said`` is what was recognised, in one line."""

    name: str
    fingerprint: str
    items: tuple[dict[str, Any], ...]
    checkers: Checkers
    max_new_tokens: int
    batch_size: int | None
    said: str = ""

    @classmethod
    def read(
        cls,
        path: Path,
        checkers: Checkers,
        *,
        name: str | None = None,
        usual: Split | None = None,
        max_new_tokens: int = 64,
        batch_size: int | None = None,
    ) -> JsonlTask:
        """Read items from a file, a folder of `datasets` or a dataset on the Hub.

        Args:
            path: a path, or another spelling of `prompts.location.Location`.
            checkers: the built-in ones, and those of a user's file.
            name: of the task; None for the source's.
            usual: split of items that do not say whether they are for validation or test; with
                None they have to.
            max_new_tokens: of an answer to an item that says none.
            batch_size: sequences at once; None for a size that fits the device.

        Raises:
            UserError: unreadable, empty, or a row that cannot be used; names the row and key.
        """
        source = Location.parse(path)
        records = read_records(source, "task")
        rows = take(records, source, every_field=True)
        items: list[dict[str, Any]] = []
        seen: set[str] = set()
        for place, row, found in rows.taken:
            where = f"{records.where}, {place}"
            item = _item(row, found, where, source, checkers, usual)
            item["id"] = str(item.get("id", place.rpartition(" ")[2]))
            if item["id"] in seen:
                raise UserError(f"{where}: id '{item['id']}' stands twice")
            seen.add(item["id"])
            items.append(item)
        if not items:
            raise UserError(
                f"{records.where} holds no items; expected lines such as "
                '{"prompt": "...", "answer": "...", "split": "test"}'
                + (f" (it said {rows.said})" if records.rows else "")
            )
        kept = [item | {"prompt": _TEXT.dump_python(item["prompt"], mode="json")} for item in items]
        content = json.dumps(kept, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode() + checkers.fingerprint.encode())
        digest.update(str(max_new_tokens).encode())
        return cls(
            name or source.name,
            digest.hexdigest(),
            tuple(items),
            checkers,
            max_new_tokens,
            batch_size,
            "" if rows.plain else f"{records.where}: {rows.said}",
        )

    def of(self, split: Split) -> list[dict[str, Any]]:
        """The items of a split, in the file's order."""
        return [item for item in self.items if item["split"] == split]

    def count(self, split: Split) -> int:
        """Items of a split."""
        return len(self.of(split))

    def question(self, item: str) -> str:
        """An item's prompt; of a chat the last message."""
        prompt = next(each["prompt"] for each in self.items if each["id"] == item)
        return prompt if isinstance(prompt, str) else str(prompt[-1].content)

    def too_long(self, model: Any, tokenizer: Any) -> str | None:
        """What to say of items longer than a model was made for, None where none is.

        Raises:
            UserError: the model has no positions for one, or its tokenizer no template for a chat.
        """
        texts = []
        for item in self.items:
            what = f"task '{self.name}': item {item['id']}"
            try:
                length = len(encode_prompt(tokenizer, item["prompt"]))
            except UserError as error:
                raise UserError(f"{what}: {error}") from error
            texts.append(TextLength(what, length, self.length(item)))
        return too_long(model, texts, "the model")

    def length(self, item: dict[str, Any]) -> int:
        """Most tokens of an item's answer."""
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
            [self.length(item) for item in items],
            self.batch_size,
            at_once,
        )
        scores = []
        for item, (text, ended) in zip(items, outputs, strict=True):
            score = self.checkers.judge(item, text)
            cut = item["checker"] == "exact" and not ended and score > 0
            scores.append(ItemScore(item["id"], 0.0 if cut else score, text, cut))
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
    device = device_of(model)
    rows, tokens = AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
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
        continued = partial(greedy, model, [encoded[i] for i in members], budget, ends, device)
        rows_out = at_once.run(continued, size) if at_once else continued(size)
        for i, ids in zip(members, rows_out, strict=True):
            ended = bool(ids) and ids[-1] in ends
            found[i] = (tokenizer.decode(ids, skip_special_tokens=True), ended)
        start += size
    return [found[i] for i in range(len(prompts))]


def _item(
    row: Any,
    found: Mapping[str, Any],
    where: str,
    source: Location,
    checkers: Checkers,
    usual: Split | None,
) -> dict[str, Any]:
    """One item of a row and what its shape says of it.

    Raises:
        UserError: it cannot be used; says which key, and what to do.
    """
    item = dict(row) if isinstance(row, Mapping) else {}
    try:
        item["prompt"] = _TEXT.validate_python(found.get("prompt"))
    except ValidationError as error:
        raise UserError(
            f"{where}: 'prompt' must be a text or chat messages ({complaint(error)})"
        ) from error
    if not item["prompt"]:
        raise UserError(f"{where}: 'prompt' is empty")
    if "answer" not in item and found.get("response") is not None:
        item["answer"] = found["response"]
    if item.get("split") is None and usual is not None:
        item["split"] = usual
    if item.get("split") not in _SPLITS:
        raise UserError(
            f"{where}: 'split' is {item.get('split')!r}; write \"valid\" for items that "
            'parameters are chosen on, "test" for those that are reported; '
            f"{option('untuned', True)} needs no 'split'"
        )
    if item.get("checker") is None:
        item["checker"] = source.checker or _usual(item)
    if isinstance(given := item.get("kwargs"), list):
        item["kwargs"] = [_stated(each) if isinstance(each, dict) else each for each in given]
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


def _usual(item: Mapping[str, Any]) -> str:
    """The checker of an item that names none: IFEval's lines have no answer but their rules."""
    return "ifeval" if "instruction_id_list" in item and "answer" not in item else "exact"


def _stated(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an IFEval rule without those that are null, which Parquet gives to every one."""
    return {key: value for key, value in arguments.items() if value is not None}
