"""Several samples in one row: what they have in common is computed once, and little is padded.

Under causal attention the tokens that samples begin with alike (a chat template's system prompt)
have the same activations in every one of them, patched or not. A packed row holds the tree of its
samples' beginnings, every token of it once; positions and an attention mask say which token
belongs where. It serves what reads values, or sums gradients over all samples; sums over a sample's
own positions need `PromptBatch.of`, for a shared position belongs to no sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.components import Partition
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import record
from mergekit_wp.prompts import PromptBatch


@dataclass(frozen=True)
class TokenCost:
    """FLOPs of one token in a layer: ``weights``, and ``attention`` for every token in its row."""

    weights: float
    attention: float

    def of(self, rows: int, width: int) -> float:
        """Cost of a batch."""
        return rows * width * (self.weights + width * self.attention)

    @classmethod
    def in_layer(cls, partition: Partition, hidden: int) -> TokenCost:
        """Of a model by its first layer and the width of its residual stream."""
        shapes = [partition.shapes[name] for name in partition.layer_tensors(0)]
        return cls(2.0 * sum(math.prod(shape) for shape in shapes), 4.0 * hidden)


@dataclass
class Packing:
    """Packs the batches of one model, where its attention allows that.

    Attributes:
        decoder: the model.
        cost: of its tokens.
    """

    decoder: Decoder
    cost: TokenCost
    _causal: int = 0  # widest batch whose tokens are known to see all before them
    _other: float = math.inf  # narrowest of which it is known that they do not

    def of(self, batch: PromptBatch) -> PromptBatch:
        """A padded batch packed, or itself."""
        return packed(batch, self.cost) if self._plainly_causal(batch) else batch

    def _plainly_causal(self, batch: PromptBatch) -> bool:
        """Whether every token sees all tokens before it, so that a mask can say who they are.

        A sliding window shorter than the prompts, or attention biased by distance, comes to the
        layers as a mask of its own. Of a model without a map nothing is known.
        """
        width = batch.ids.shape[1]
        if not self.decoder.architecture.mapped or width >= self._other:
            return False
        if width > self._causal:
            with torch.no_grad():
                calls = record(self.decoder, batch.part(0, 1)).calls
            if any(
                call.kwargs.get("attention_mask", "unknown") is not None or "alibi" in call.kwargs
                for call in calls
            ):
                self._other = width
                return False
            self._causal = width
        return True


def packed(batch: PromptBatch, cost: TokenCost) -> PromptBatch:
    """The cheapest packing of a padded batch; the batch itself where no packing is cheaper.

    Rows hold equally many samples, in the batch's order. The order of the positions that are read
    stays, so that targets of the padded batch fit.
    """
    samples = _samples(batch)
    plain = cost.of(batch.n_rows, batch.ids.shape[1])
    layouts = [_rows(samples, count) for count in range(2, batch.size + 1)]
    costs = [cost.of(len(rows), max(row.width for row in rows)) for rows in layouts]
    if not costs or min(costs) >= plain:
        return batch
    return _batch(batch, layouts[costs.index(min(costs))])


@dataclass(frozen=True)
class _Row:
    """One row: the columns of each sample's tokens, and of how many tokens it is made."""

    samples: Sequence[list[int]]
    columns: Sequence[list[int]]
    width: int

    @classmethod
    def of(cls, samples: Sequence[list[int]]) -> _Row:
        """A column for every token that does not follow the same ones in an earlier sample."""
        known: dict[tuple[int, int], int] = {}  # by the column before and the token
        columns = []
        for sample in samples:
            found, before = [], -1
            for token in sample:
                before = known.setdefault((before, token), len(known))
                found.append(before)
            columns.append(found)
        return cls(samples, columns, len(known))


def _samples(batch: PromptBatch) -> list[list[int]]:
    """Each sample's tokens without padding."""
    ends = (batch.last + 1).tolist()
    for row, col in zip(batch.rows.tolist(), batch.cols.tolist(), strict=True):
        ends[row] = max(ends[row], col + 1)
    return [ids[:end] for ids, end in zip(batch.ids.tolist(), ends, strict=True)]


def _rows(samples: Sequence[list[int]], count: int) -> list[_Row]:
    starts = range(0, len(samples), count)
    return [_Row.of(samples[start : start + count]) for start in starts]


def _batch(batch: PromptBatch, rows: Sequence[_Row]) -> PromptBatch:
    device = batch.ids.device
    width = max(row.width for row in rows)
    longest = max(len(sample) for row in rows for sample in row.samples)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions = torch.zeros_like(ids)
    # [rows, query, key]; padding sees itself: softmax of nothing is NaN
    seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    past = torch.ones((longest, longest), dtype=torch.bool).tril()
    row_of: list[int] = []
    column_of = torch.zeros((batch.size, longest), dtype=torch.long)
    for r, row in enumerate(rows):
        for sample, columns in zip(row.samples, row.columns, strict=True):
            length, own = len(sample), torch.tensor(columns)
            ids[r, own] = torch.tensor(sample)
            positions[r, own] = torch.arange(length)
            seen[r, own.unsqueeze(1), own] |= past[:length, :length]
            column_of[len(row_of), :length] = own
            row_of.append(r)
    row_at, column_of = torch.tensor(row_of, device=device), column_of.to(device)
    return replace(
        batch,
        ids=ids.to(device),
        last_rows=row_at[batch.last_rows],
        last=column_of[batch.last_rows, batch.last],
        rows=row_at[batch.owners],
        cols=column_of[batch.owners, batch.cols],
        arguments={
            "attention_mask": seen.unsqueeze(1).to(device),
            "position_ids": positions.to(device),
        },
    )
