"""Components sorted by score, as columns: a million of them are a few arrays, not objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_wp.components import layout_of
from mergekit_wp.errors import UserError
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.terms import (
    CRITERIA,
    ESTIMANDS,
    KINDS,
    SLICED_KINDS,
    CriterionName,
    Estimand,
    Kind,
)

_CHUNK = 20_000
# leaders of a coarser view, beside the main list
_ASIDE = 5


@dataclass(frozen=True)
class Selection:
    """Estimands, criteria and kinds to look at, each in the field's usual order."""

    estimands: tuple[Estimand, ...]
    criteria: tuple[CriterionName, ...]
    kinds: tuple[Kind, ...]

    @property
    def pairs(self) -> list[tuple[Estimand, CriterionName]]:
        """Every estimand with every criterion."""
        return [(e, c) for e in self.estimands for c in self.criteria]


def _choose(what: str, wanted: str | None, have: Sequence[str], order: Sequence[str]) -> Any:
    if wanted is None:
        rank = {name: i for i, name in enumerate(order)}  # callers' criteria last, as they stand
        return tuple(sorted(have, key=lambda name: rank.get(name, len(rank))))
    if wanted not in have:
        raise UserError(f"no {what} '{wanted}' in this score file; it has {', '.join(have)}")
    return (wanted,)


def select(
    score_file: ScoreFile,
    estimand: str | None = None,
    criterion: str | None = None,
    kind: str | None = None,
) -> Selection:
    """What the filters leave; None leaves everything.

    Raises:
        UserError: a filter the file has no scores for; says which it has.
    """
    manifest = score_file.manifest
    return Selection(
        _choose("estimand", estimand, manifest.estimands, ESTIMANDS),
        _choose("criterion", criterion, manifest.criteria, CRITERIA),
        _choose("kind", kind, manifest.kinds, KINDS),
    )


@dataclass(frozen=True)
class RankedComponent:
    """One component with its score."""

    kind: Kind
    layer: int | None
    index: int
    name: str
    estimand: Estimand
    criterion: CriterionName
    score: float
    se: float | None


@dataclass(frozen=True)
class _Block:
    """One score tensor, flat; ``positions`` are those of its entries that take part."""

    estimand: Estimand
    criterion: CriterionName
    kind: Kind
    width: int
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    se: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class Ranking:
    """Components in order of score, highest first.

    Equal scores keep the order estimand, criterion, kind, layer, index, so that two runs print
    the same.
    """

    blocks: tuple[_Block, ...]
    order: npt.NDArray[np.int64]
    tensor_names: tuple[str, ...]
    tensor_layers: tuple[int | None, ...]

    def __len__(self) -> int:
        """Number of ranked components."""
        return len(self.order)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[RankedComponent]:
        """Components of ranks ``start`` to ``stop``, counted from 0."""
        ends = np.cumsum([len(block.positions) for block in self.blocks])
        starts = [0, *ends.tolist()]
        order = self.order[start:stop]
        owners = np.searchsorted(ends, order, side="right").tolist()
        for owner, place in zip(owners, order.tolist(), strict=True):
            block = self.blocks[owner]
            position = int(block.positions[place - starts[owner]])
            layer, index, name = self._address(block, position)
            yield RankedComponent(
                block.kind,
                layer,
                index,
                name,
                block.estimand,
                block.criterion,
                float(block.scores[position]),
                None if block.se is None else float(block.se[position]),
            )

    def _address(self, block: _Block, position: int) -> tuple[int | None, int, str]:
        """Layer, index and name as `Partition.components` gives them."""
        if block.kind == "tensor":
            return self.tensor_layers[position], position, self.tensor_names[position]
        if block.kind == "layer":
            return position, position, f"layer {position}"
        layer, index = divmod(position, block.width)
        return layer, index, f"layer {layer} {block.kind} {index}"


def rank(
    score_file: ScoreFile,
    selection: Selection,
    *,
    top: int | None = None,
    fine: bool = False,
) -> Ranking:
    """Sort the selected components by score.

    Args:
        score_file: a checked score file.
        selection: which scores to look at.
        top: keep only the first ``top`` of the sorted list.
        fine: under ``tensor`` keep only tensors that are components of the fine partition, so
            that no weight is listed twice.
    """
    manifest = score_file.manifest
    layouts = [layout_of(name, manifest.dims) for name in manifest.tensor_names]
    blocks = []
    for estimand, criterion in selection.pairs:
        for kind in selection.kinds:
            tensor = score_file.scores(estimand, criterion, kind)
            scores = tensor.numpy().reshape(-1)
            se = score_file.tensors.get(f"{estimand}/{criterion}/{kind}.se")
            positions = np.arange(len(scores), dtype=np.int64)
            if fine and kind == "tensor":
                whole = [i for i, layout in enumerate(layouts) if layout.whole]
                positions = np.array(whole, dtype=np.int64)
            blocks.append(
                _Block(
                    estimand,
                    criterion,
                    kind,
                    manifest.dims.count(kind) if kind in SLICED_KINDS else 1,
                    positions,
                    scores,
                    None if se is None else se.numpy().reshape(-1),
                )
            )
    values = [block.scores[block.positions] for block in blocks]
    order = np.argsort(-np.concatenate(values), kind="stable") if values else np.empty(0, np.int64)
    return Ranking(
        tuple(blocks),
        order[:top].astype(np.int64),
        manifest.tensor_names,
        tuple(layout.layer for layout in layouts),
    )


@dataclass(frozen=True)
class Leaders:
    """A short list of leading components; ``aside`` marks a coarser view of the same weights."""

    title: str
    rows: list[RankedComponent]
    aside: bool = False


def leaders(
    score_file: ScoreFile,
    estimand: Estimand,
    criterion: CriterionName,
    kinds: tuple[Kind, ...],
    top: int,
) -> list[Leaders]:
    """Leading components for people to read.

    Kinds of the fine partition are ranked together. Layers and whole tensors contain those, and
    would stand above them all, so they come in lists of their own.
    """

    def listed(title: str, chosen: tuple[Kind, ...], n: int, **how: bool) -> Leaders:
        selection = Selection((estimand,), (criterion,), chosen)
        ranking = rank(score_file, selection, top=n, fine=how.get("fine", False))
        return Leaders(title, list(ranking.rows()), how.get("aside", False))

    coarse: tuple[tuple[Kind, str], ...] = (("layer", "layers"), ("tensor", "tensors"))
    present = [(kind, title) for kind, title in coarse if kind in kinds]
    if not set(kinds) & set(SLICED_KINDS):
        return [listed(title, (kind,), top) for kind, title in present]
    fine = tuple(kind for kind in kinds if kind != "layer")
    few = min(top, _ASIDE)
    return [
        listed("components", fine, top, fine=True),
        *(listed(title, (kind,), few, aside=True) for kind, title in present),
    ]


def to_json(score_file: ScoreFile, selection: Selection, top: int | None) -> Iterator[str]:
    """One JSON object with ``manifest`` and the ``top`` ``components``, piece by piece."""
    ranking = rank(score_file, selection, top=top)
    yield f'{{"manifest": {score_file.manifest.model_dump_json()}, "components": ['
    for start in range(0, len(ranking), _CHUNK):
        rows = ranking.rows(start, start + _CHUNK)
        public = ({k: v for k, v in vars(row).items() if k != "se"} for row in rows)
        yield (",\n" if start else "\n") + ",\n".join(map(json.dumps, public))
    yield "\n]}\n"
