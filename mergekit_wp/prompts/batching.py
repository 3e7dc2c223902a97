"""The tokens of prompts, in batches.

Sequences are padded on the right and no mask is needed: under causal attention nothing looks at a
later position, and where the length of the longest changes all positions, each length goes with
its like. So a prompt's numbers do not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch


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
    apart: Collection[int] = (),
) -> Iterator[PromptBatch]:
    """Batches of at most `size` samples, similar lengths together.

    Args:
        samples: prompts, with responses or without.
        size: the most in a batch.
        device: where they go.
        side: of a length; samples of different sides do not go together
            (`architectures.computation.RopeBorders`).
        apart: which samples are in batches of their own, after the others.
    """
    for among in (True, False):
        part = [i for i in range(len(samples)) if (i not in apart) == among]
        for places in together([len(samples[i].input_ids) for i in part], size, side):
            members = [part[place] for place in places]
            yield PromptBatch.of([samples[i] for i in members], members, device)


def together(
    lengths: Sequence[int], size: int, side: Callable[[int], Hashable]
) -> Iterator[list[int]]:
    """Which of some sequences go through a model together: at most `size`, all of one side."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for _, alike in groupby(order, key=lambda i: side(lengths[i])):
        members = list(alike)
        yield from (members[start : start + size] for start in range(0, len(members), size))
