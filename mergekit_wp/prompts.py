"""Prompts, from a file or from memory, and their tokens in batches.

A prompt file is JSONL: ``prompt`` (text or chat messages), optional ``contrast`` (the same request
without the instruction), optional ``response``. Sequences are padded on the right and no mask is
needed: under causal attention nothing looks at a later position, and where the length of the
longest changes all positions, each length goes with its like. So a prompt's numbers do not depend
on what it is batched with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import complaint, parse_json, read_lines


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
        if value is not None and not isinstance(value, str) and not parts:
            raise ValueError("expected a text, a list of parts such as {'type': 'text'}, or null")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.model_extra:
            raise ValueError("expected 'content', or another key such as 'tool_calls'")
        return self


def _form(value: object) -> str:
    return "messages" if isinstance(value, list) else "text"


#: a text or chat messages; errors speak of the one that it seems to be
Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")], Discriminator(_form)
]


class Prompt(BaseModel):
    """One line of a prompt file; other keys are kept out."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    prompt: Text
    contrast: Text | None = None
    response: str | None = None

    @property
    def usable_contrast(self) -> bool:
        """Whether the contrast is there and differs from the prompt."""
        return bool(self.contrast) and self.contrast != self.prompt


@dataclass(frozen=True)
class PromptSet:
    """The prompts to use.

    Attributes:
        prompts: in order.
        sha256: of the file they came from, or of their canonical lines if they were given.
        source: where they came from, for messages.
        name: what their behaviour is called where nobody says otherwise.
    """

    prompts: tuple[Prompt, ...]
    sha256: str
    source: str
    name: str

    @property
    def responses(self) -> Literal["given", "expert", "mixed"]:
        """Whose answers the prompts go on with: the file's, the expert's own, or some of each."""
        given = sum(prompt.response is not None for prompt in self.prompts)
        return "given" if given == len(self.prompts) else "mixed" if given else "expert"


#: a prompt file, or the prompts themselves
PromptSource = Path | tuple[Prompt, ...]


def read_prompts(source: PromptSource, limit: int | None, name: str = "prompts") -> PromptSet:
    """Read a prompt file, or take prompts as they are given: the one entrance for both.

    Args:
        source: the JSONL file, or prompts in memory.
        limit: use the first `limit` prompts only.
        name: of prompts in memory; a file's is its own.

    Raises:
        UserError: no such file, a broken line (its number), an empty prompt, or no prompts.
    """
    if isinstance(source, Path):
        where, name = f"prompt file {source}", source.stem
        content, lines = read_lines(source, where)
        prompts = [
            _parse(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if line.strip()
        ]
    else:
        where = f"'{name}'"
        prompts = [_checked(prompt, f"{where}, prompt {n}") for n, prompt in enumerate(source, 1)]
        content = canonical(prompts).encode()
    if not prompts:
        raise UserError(
            f"{where} holds no prompts; expected at least one, in a file one JSON object a line, "
            'such as {"prompt": "..."}'
        )
    return PromptSet(tuple(prompts[:limit]), hashlib.sha256(content).hexdigest(), where, name)


def prompt_source(given: Any) -> PromptSource:
    """Prompts as a caller from Python gives them.

    Args:
        given: a path; or an iterable, such as a list or a dataset, of texts, chats (lists of
            messages), `Prompt` objects and mappings with ``prompt`` and optional ``contrast`` and
            ``response``.

    Raises:
        UserError: names the first that is none of these.
    """
    if isinstance(given, str | os.PathLike):
        return Path(given)
    found = []
    for number, one in enumerate(given, 1):
        fields = dict(one) if isinstance(one, Mapping) else {"prompt": one}
        try:
            found.append(one if isinstance(one, Prompt) else Prompt.model_validate(fields))
        except ValidationError as error:
            raise UserError(
                f"prompt {number}: {complaint(error)}; expected a text, a list of messages, or an "
                "object with 'prompt' and optional 'contrast' and 'response'"
            ) from error
    return tuple(found)


def canonical(prompts: Sequence[Prompt]) -> str:
    """Prompts as a prompt file, one line each: sorted keys, nothing that is not there."""
    found = [prompt.model_dump(mode="json", exclude_none=True) for prompt in prompts]
    return "".join(json.dumps(p, sort_keys=True, ensure_ascii=False) + "\n" for p in found)


def _parse(line: str, where: str) -> Prompt:
    try:
        prompt = Prompt.model_validate(parse_json(line))
    except ValidationError as error:
        raise UserError(
            f"{where}: {complaint(error)}; expected an object with 'prompt' and optional "
            "'contrast' and 'response'"
        ) from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    return _checked(prompt, where)


def _checked(prompt: Prompt, where: str) -> Prompt:
    if not prompt.prompt:
        raise UserError(f"{where}: 'prompt' is empty")
    return prompt


@dataclass(frozen=True)
class Sample:
    """One prompt with its response, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model reads: the last response token is only ever predicted."""
        return self.prompt_ids + self.response_ids[:-1]


@dataclass(frozen=True)
class PromptBatch:
    """Samples in rows: right-padded, one a row, or `packing.packed`, several a row.

    Attributes:
        ids: ``[rows, T]`` input tokens.
        last_rows, last: ``[n]`` row and column of each sample's last prompt token.
        rows, cols: ``[P]`` row and column that predict each response token.
        owners: ``[P]`` which sample that token belongs to.
        targets: ``[P]`` the response tokens.
        members: ``[n]`` index of each sample in the prompt file.
        arguments: what the model has to be told about rows that hold several samples.
    """

    ids: torch.Tensor
    last_rows: torch.Tensor
    last: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    owners: torch.Tensor
    targets: torch.Tensor
    members: torch.Tensor
    arguments: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.members.shape[0]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    def part(self, start: int, stop: int) -> PromptBatch:
        """Some of the samples; the batch has one a row."""
        own = self.in_part(start, stop)
        return PromptBatch(
            ids=self.ids[start:stop],
            last_rows=self.last_rows[start:stop] - start,
            last=self.last[start:stop],
            rows=self.rows[own] - start,
            cols=self.cols[own],
            owners=self.owners[own] - start,
            targets=self.targets[own],
            members=self.members[start:stop],
        )

    def in_part(self, start: int, stop: int) -> torch.Tensor:
        """Which response tokens belong to those samples, ``[P]``."""
        return (self.owners >= start) & (self.owners < stop)

    @classmethod
    def of(cls, samples: Sequence[Sample], members: Sequence[int], device: str) -> PromptBatch:
        """Pad samples on the right."""
        width = max(len(s.input_ids) for s in samples)
        padded = [[*s.input_ids, *[0] * (width - len(s.input_ids))] for s in samples]
        rows, cols, targets = [], [], []
        for row, sample in enumerate(samples):
            for offset, token in enumerate(sample.response_ids):
                rows.append(row)
                cols.append(len(sample.prompt_ids) - 1 + offset)
                targets.append(token)

        def long(values: list[int] | list[list[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            ids=long(padded),
            last_rows=long(list(range(len(samples)))),
            last=long([len(s.prompt_ids) - 1 for s in samples]),
            rows=long(rows),
            cols=long(cols),
            owners=long(rows),
            targets=long(targets),
            members=torch.tensor(list(members), dtype=torch.long),
        )


def batches(
    samples: Sequence[Sample],
    size: int,
    device: str,
    side: Callable[[int], Hashable] = lambda _length: None,
) -> Iterator[PromptBatch]:
    """Batches of at most `size` samples, similar lengths together.

    Args:
        samples: prompts, with responses or without.
        size: the most in a batch.
        device: where they go.
        side: of a length; samples of different sides do not go together
            (`architectures.computation.RopeBorders`).
    """
    for members in together([len(s.input_ids) for s in samples], size, side):
        yield PromptBatch.of([samples[i] for i in members], members, device)


def together(
    lengths: Sequence[int], size: int, side: Callable[[int], Hashable]
) -> Iterator[list[int]]:
    """Which of some sequences go through a model together: at most `size`, all of one side."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for _, alike in groupby(order, key=lambda i: side(lengths[i])):
        members = list(alike)
        yield from (members[start : start + size] for start in range(0, len(members), size))
