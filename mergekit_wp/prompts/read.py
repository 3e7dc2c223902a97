"""From a source to prompts: the one entrance for files, datasets, tasks and memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import complaint
from mergekit_wp.prompts.dataset import pinned_text, without_nulls
from mergekit_wp.prompts.location import Location
from mergekit_wp.prompts.prompt import Prompt, PromptSet, PromptSource, canonical
from mergekit_wp.prompts.records import Records, read_records
from mergekit_wp.prompts.shapes import NO_PROMPT, SHAPES, TEXTS, RowShape, recognised

_EXPECTED = "an object with 'prompt' and optional 'contrast' and 'response'"


def read_prompts(
    source: PromptSource, limit: int | None, name: str = "prompts", *, distinct: bool = False
) -> PromptSet:
    """Read prompts from wherever they are, or take them as they are given.

    Args:
        source: see `location.Location`, or prompts in memory.
        limit: use the first `limit` prompts only.
        name: of prompts in memory; a file's is its own.
        distinct: use what repeats another only once; the hash is of all.

    Raises:
        UserError: no such source, fields that are not known, a broken row (its number), an empty
            prompt, or no prompts.
    """
    said, plain = "", True
    if isinstance(source, Path):
        parsed = Location.parse(source)
        if parsed.checker is not None:
            raise UserError(f"{source}: 'checker' is for items, not for prompts; leave it out")
        records = read_records(parsed, "prompt")
        where, name = records.where, parsed.name
        rows = take(records, parsed, once=distinct)
        every, said, plain = _prompts(records, rows, parsed), rows.said, rows.plain
    else:
        where = f"'{name}'"
        every = [_checked(prompt, f"{where}, prompt {n}") for n, prompt in enumerate(source, 1)]
    if not every:
        raise UserError(
            f"{where} holds no prompts; expected at least one, in a file one JSON object a line, "
            'such as {"prompt": "..."}' + (f" (it said {said})" if said else "")
        )
    prompts = list({canonical([p]): p for p in every}.values()) if distinct else every
    if len(prompts) < len(every):
        used = f"{len(prompts)} of {len(every)} are used, each once"
        said, plain = f"{said}; {used}" if said else used, False
    content = canonical(every).encode()
    if limit is not None and limit < len(prompts) and said:
        said += f"; the first {limit} are used"
    sha256 = hashlib.sha256(content).hexdigest()
    said = said and f"{where}: {said}"
    return PromptSet(tuple(prompts[:limit]), sha256, where, name, said, plain)


def prompt_source(given: Any) -> PromptSource:
    """Prompts as a caller from Python gives them.

    Args:
        given: a path, or how `location.Location` is written; or an iterable, such as a list or a
            dataset, of texts, chats (lists of messages), `Prompt` objects and mappings of a shape
            that is known by its fields; or a pandas frame of such rows.

    Raises:
        UserError: names the first that is none of these.
    """
    if isinstance(given, str | os.PathLike):
        return Path(pinned_text(os.fspath(given)))
    if isinstance(given, Mapping):
        raise UserError(
            f"prompts are given by name ({', '.join(map(str, given))}); expected those of one: a "
            "list, or one split of a dataset"
        )
    if is_frame(given):  # which yields the names of its columns
        given = given.astype(object).where(given.notna(), None).to_dict("records")
    if not isinstance(given, Iterable):
        raise UserError(
            f"prompts: expected a path, or texts, chats or objects in a list, not {given!r:.60}"
        )
    rows = [without_nulls(row) for row in given]
    shape = SHAPES[0]
    if mappings := [row for row in rows if isinstance(row, Mapping)]:
        shape = recognised(mappings, Location(place="the prompts"), "the list of prompts")
    found = []
    for number, one in enumerate(rows, 1):
        fields = shape.of(one) if isinstance(one, Mapping) else {"prompt": one}
        try:
            found.append(one if isinstance(one, Prompt) else _prompt(fields))
        except ValueError as error:
            raise UserError(
                f"prompt {number}: {_why(error)}; expected a text, a list of messages, or "
                f"{_EXPECTED}"
            ) from error
    return tuple(found)


def is_frame(given: Any) -> bool:
    """Whether it is a frame of pandas, which need not be installed."""
    return hasattr(given, "columns") and hasattr(given, "notna")


def source_name(source: PromptSource, otherwise: str) -> str:
    """What the behaviour of prompts is called: by where they are, else as the caller says."""
    return Location.parse(source).name if isinstance(source, Path) else otherwise


@dataclass(frozen=True)
class Taken:
    """The rows of a source that are taken.

    Attributes:
        shape: what their fields mean.
        taken: of each its place, itself, and its prompt, contrast and response.
        said: what was recognised, how many were taken and how many skipped and why, in one line.
        plain: all of a JSONL file whose fields are our own.
    """

    shape: RowShape
    taken: tuple[tuple[str, Any, dict[str, Any]], ...]
    said: str
    plain: bool


def take(
    records: Records, source: Location, every_field: bool = False, *, once: bool = False
) -> Taken:
    """Rows by their shape, without those that have no prompt; distinct or drawn where asked.

    Args:
        records: as they were read.
        source: says how.
        every_field: whether the caller reads the others as well.
        once: whether the caller leaves out what repeats another, and says so.

    Raises:
        UserError: fields that are not known, or a row that is no object.
    """
    objects = [row for _, row in records.rows if isinstance(row, Mapping)]
    texts = all(isinstance(row, str) for _, row in records.rows) and records.form != "JSONL"
    shape = TEXTS if texts else SHAPES[0]
    if objects:
        shape = recognised(objects, source, records.where)
    skipped: Counter[str] = Counter()
    chosen, repeated = [], 0
    seen: set[str] = set()
    for place, row in records.rows:
        if not texts and not isinstance(row, Mapping):
            raise UserError(f"{records.where}, {place}: expected {_EXPECTED}")
        found = shape.of(row)
        if isinstance(found, str):
            skipped[found] += 1
            continue
        if found.get("prompt") in (None, "", []) and (records.table or not shape.own):
            skipped[NO_PROMPT] += 1
            continue
        if (content := _content(row, found)) in seen:
            repeated += 1
            if source.distinct:
                continue
        seen.add(content)
        chosen.append((place, row, found))
    notes = []
    if repeated and source.distinct:
        skipped["that came before"] = repeated
    elif repeated:
        way_out = "" if once else f" ('{source.but(distinct=True)}' leaves them out)"
        notes = [f"{repeated} repeat another{way_out}"]
    if source.sample is not None and source.sample < len(chosen):
        notes.append(f"drawn from {len(chosen)} by seed {source.seed}")
        chosen = [chosen[i] for i in source.drawn(len(chosen))]
    fields = () if every_field else tuple(dict.fromkeys(str(key) for row in objects for key in row))
    line = _account(records, fields, shape, len(chosen), skipped)
    plain = records.form == "JSONL" and shape.own and not skipped and not notes
    return Taken(shape, tuple(chosen), "; ".join([line, *notes]), plain)


def _content(row: Any, found: dict[str, Any]) -> str:
    """What makes a row the same as another: its prompt, and what answers it."""
    answer = row.get("answer") if isinstance(row, Mapping) else None
    return json.dumps([found, answer], sort_keys=True, default=str)


def _account(
    records: Records,
    fields: Sequence[str],
    shape: RowShape,
    taken: int,
    skipped: Mapping[str, int],
) -> str:
    read = [field for field in fields or shape.needs if field in shape.fields]
    line = f"{taken} from {records.form}"
    if read:
        line += f", {shape.name} ({', '.join(read)})"
    if unread := [field for field in fields if field not in shape.fields]:
        more = ", ..." if len(unread) > 5 else ""
        line += f", not read: {', '.join(unread[:5])}{more}"
    if skipped:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        line += f"; {sum(skipped.values())} skipped: {why}"
    return line


def _prompts(records: Records, rows: Taken, source: Location) -> list[Prompt]:
    prompts = []
    for place, _, found in rows.taken:
        where = f"{records.where}, {place}"
        try:
            prompt = _prompt(found)
        except ValueError as error:
            fields = ", ".join(rows.shape.fields)
            expected = _EXPECTED if rows.shape.own else f"texts or chats in {fields}"
            raise UserError(
                f"{where}: {_why(error)}; expected {expected}{_way_out(source, error)}"
            ) from error
        prompts.append(_checked(prompt, where))
    return prompts


def _prompt(found: dict[str, Any] | str) -> Prompt:
    """A prompt of what a row says.

    Raises:
        ValueError: it says why it has none, or says it wrongly.
    """
    if isinstance(found, str):
        raise ValueError(f"it is one {found}")
    return Prompt.model_validate(found)


def _why(error: ValueError) -> str:
    return complaint(error) if isinstance(error, ValidationError) else str(error)


def _way_out(source: Location, error: ValueError) -> str:
    """An answer that is no text can be left out."""
    if isinstance(error, ValidationError) and error.errors()[0]["loc"][:1] == ("response",):
        return f"; '{source.but(response='')}' leaves answers out"
    return ""


def _checked(prompt: Prompt, where: str) -> Prompt:
    if not prompt.prompt:
        raise UserError(f"{where}: 'prompt' is empty")
    return prompt
