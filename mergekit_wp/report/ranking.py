"""Components sorted by score, as columns: a million of them are a few arrays, not objects."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_wp.components import layout_of
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.container import COUNTS
from mergekit_wp.files.manifest import DRAWS, Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report.request import LEADING
from mergekit_wp.statistics import MIN_PROMPTS, MIN_TOP
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
    """Estimands, criteria and kinds to look at, each in the field's usual order.

    ``stable``: of these only the components that lead in `LEADING` of the draws over prompts.
    """

    estimands: tuple[Estimand, ...]
    criteria: tuple[CriterionName, ...]
    kinds: tuple[Kind, ...]
    stable: bool = False

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
    stable: bool = False,
) -> Selection:
    """What the filters leave; None leaves everything.

    Raises:
        UserError: a filter the file has no scores for; says which it has. No leads were counted for
            what is left, and only stable leaders are wanted.
    """
    manifest = score_file.manifest
    found = Selection(
        _choose("estimand", estimand, manifest.estimands, ESTIMANDS),
        _choose("criterion", criterion, manifest.criteria, CRITERIA),
        _choose("kind", kind, manifest.kinds, KINDS),
        stable,
    )
    if stable and not any(
        f"{e}/{c}/{k}{COUNTS}" in score_file.tensors for e, c in found.pairs for k in found.kinds
    ):
        raise UserError(
            f"{option('stable')}: this score file does not say how stably its components lead; "
            f"`score` counts that by {MIN_PROMPTS} prompts or more, for kinds with at least "
            f"{2 * MIN_TOP} components"
        )
    return found


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
class Ranking:
    """Components in order of score, highest first.

    Equal scores keep the order estimand, criterion, kind, layer, index, so that two runs print
    the same.

    Attributes:
        manifest: of the score file.
        tensors: the score tensors, as estimand, criterion and kind.
        owners: of each component, the number of its tensor.
        positions: its place there, flat.
        scores: its score.
        se: its standard error, NaN where there is none.
    """

    manifest: Manifest
    tensors: tuple[tuple[Estimand, CriterionName, Kind], ...]
    owners: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    se: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Number of ranked components."""
        return len(self.scores)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[RankedComponent]:
        """Components of ranks ``start`` to ``stop``, counted from 0."""
        columns = (self.owners, self.positions, self.scores, self.se)
        for owner, position, score, se in zip(
            *(column[start:stop].tolist() for column in columns), strict=True
        ):
            estimand, criterion, kind = self.tensors[owner]
            place = self._address(kind, position)
            known = None if math.isnan(se) else se
            yield RankedComponent(kind, *place, estimand, criterion, score, known)

    def _address(self, kind: Kind, position: int) -> tuple[int | None, int, str]:
        """Layer, index within its kind and layer, and name."""
        if kind == "tensor":
            name = self.manifest.tensor_names[position]
            return layout_of(name, self.manifest.dims).layer, position, name
        if kind == "layer":
            return position, position, f"layer {position}"
        layer, index = divmod(position, self.manifest.shape(kind)[1])
        return layer, index, f"layer {layer} {kind} {index}"


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
    tensors = tuple((e, c, kind) for e, c in selection.pairs for kind in selection.kinds)
    none = (np.empty(0, np.int64), np.empty(0, np.int64), *np.empty((2, 0), np.float32))
    parts = [none]  # a file may have no kinds
    for owner, (estimand, criterion, kind) in enumerate(tensors):
        scores = score_file.scores(estimand, criterion, kind).numpy().reshape(-1)
        error = score_file.tensors.get(f"{estimand}/{criterion}/{kind}.se")
        se = np.full_like(scores, np.nan) if error is None else error.numpy().reshape(-1)
        kept = np.arange(len(scores))
        if selection.stable:
            kept = _stable(score_file, f"{estimand}/{criterion}/{kind}")
        if fine and kind == "tensor":
            whole = [layout_of(name, manifest.dims).whole for name in manifest.tensor_names]
            kept = kept[np.array(whole, dtype=bool)[kept]]
        parts.append((np.full(len(kept), owner), kept, scores[kept], se[kept]))
    owners, positions, scores, se = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")[:top]
    return Ranking(manifest, tensors, owners[order], positions[order], scores[order], se[order])


def _stable(score_file: ScoreFile, key: str) -> npt.NDArray[np.int64]:
    """Places of the components that lead in nearly all draws over the prompts."""
    counts = score_file.tensors.get(f"{key}{COUNTS}")
    if counts is None:
        return np.empty(0, np.int64)
    return (counts.numpy().reshape(-1) >= LEADING * DRAWS).nonzero()[0]


def stable_leaders(
    score_file: ScoreFile,
    estimand: Estimand,
    criterion: CriterionName,
    kinds: tuple[Kind, ...],
) -> dict[Kind, int]:
    """How many components of each kind lead in nearly all draws, of kinds where that is known."""
    keys = {kind: f"{estimand}/{criterion}/{kind}" for kind in kinds}
    return {
        kind: len(_stable(score_file, key))
        for kind, key in keys.items()
        if f"{key}{COUNTS}" in score_file.tensors
    }


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
    stable: bool = False,
) -> list[Leaders]:
    """Leading components for people to read.

    Kinds of the fine partition are ranked together. Layers and whole tensors contain those, and
    would stand above them all, so they come in lists of their own.
    """

    def listed(title: str, chosen: tuple[Kind, ...], n: int, **how: bool) -> Leaders:
        selection = Selection((estimand,), (criterion,), chosen, stable)
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
        yield (",\n" if start else "\n") + ",\n".join(map(json.dumps, map(vars, rows)))
    yield "\n]}\n"
