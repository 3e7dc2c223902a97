"""Run the sweeps of one request, and collect every component's change per prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal

import torch

from mergekit_wp.criteria import has_gap, per_prompt, recovery
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.recordings import Recordings, Result
from mergekit_wp.runs.run import Jobs
from mergekit_wp.scoring.blocks import (
    Block,
    Selected,
    exact_blocks,
    first_order_blocks,
    flat,
    noise_blocks,
    share_blocks,
)
from mergekit_wp.scoring.fidelity import leaders, uniform_sample, verdict
from mergekit_wp.scoring.measure import CURVATURE, measure
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.terms import (
    KINDS,
    SLICED_KINDS,
    CriterionName,
    Estimand,
    FineKind,
    Kind,
    ScoringMethod,
    of_activations,
    of_knockout,
)


class Sweeps:
    """The sweeps of one request, and the changes they found.

    ``changes[estimand, criterion, kind]`` is ``[prompts, *shape of the kind]``; ``curvature`` is
    the part of estimated ones that is their second order, where there is one.

    Args:
        request: what to measure.
        recordings: of its models on its prompts.
        at_once: how many sequences go through the model together.
        jobs: where blocks are computed and kept.
    """

    def __init__(
        self,
        request: ScoreRequest,
        recordings: Recordings,
        at_once: AtOnce,
        jobs: Jobs,
    ) -> None:
        self.request, self.recordings = request, recordings
        self.at_once, self.jobs = at_once, jobs
        self.criteria, self.partition = recordings.criteria, recordings.partition
        self.changes: dict[tuple[Estimand, CriterionName, Kind], torch.Tensor] = {}
        self.curvature: dict[tuple[Estimand, CriterionName, Kind], torch.Tensor] = {}
        self.fidelity: dict[str, Fidelity] = {}
        self.noise: dict[CriterionName, float] = {}
        self.completeness: dict[str, float] = {}

    def all(self) -> None:
        """Every sweep that was asked for."""
        swaps: list[Estimand] = [e for e in self.request.estimand if e != "share"]
        if "share" in self.request.estimand:
            self._share()
        for estimand in swaps:
            if not of_activations(estimand):
                self._noise(estimand)
            self._exact(estimand)
            self._first_order(estimand)
        if not any(estimand in ("gain", "knockout") for estimand in swaps):
            self._noise("gain")

    def _finished(self, name: str, blocks: Iterable[Block]) -> Iterator[tuple[Block, Result]]:
        """Compute a sweep's blocks, or take them from the journal; in the sweep's order."""
        work = partial(measure, recordings=self.recordings, at_once=self.at_once)
        cost = partial(Block.cost, recordings=self.recordings, at_once=self.at_once.size)
        return self.jobs.finished(name, "forward", blocks, work, cost)

    def _by_kind(self, result: Result) -> Iterator[tuple[CriterionName, Kind, torch.Tensor]]:
        for c in self.criteria:
            for kind in KINDS:
                if (value := result.get(f"{c}/{kind}")) is not None:
                    yield c, kind, value

    def _shape(self, kind: Kind) -> tuple[int, ...]:
        dims = self.partition.dims
        if kind == "layer":
            return (dims.n_layers,)
        if kind == "tensor":
            return (len(self.partition.tensor_names),)
        return (dims.n_layers, dims.count(kind))

    def _zeros(self, estimand: Estimand, kinds: Iterable[Kind]) -> None:
        for kind in kinds:
            for c in self.criteria:
                shape = (self.recordings.n_prompts, *self._shape(kind))
                self.changes[estimand, c, kind] = torch.zeros(shape, dtype=torch.float64)

    def _members(self, block: Block) -> torch.Tensor:
        return self.recordings.references.batches[block.batch].members

    def _distance(self, c: CriterionName) -> torch.Tensor:
        return self.recordings.references.values[c].distance.double()

    def _share(self) -> None:
        self._zeros("share", KINDS)
        steps = self.request.share_steps
        for block, result in self._finished("share", share_blocks(self.recordings, steps)):
            members = self._members(block)
            for c, kind, value in self._by_kind(result):
                self.changes["share", c, kind][members] += value.double() / steps
        partition = self.partition
        of_layer = torch.zeros((len(partition.tensor_names), partition.dims.n_layers)).double()
        for i, name in enumerate(partition.tensor_names):
            if (layer := partition.layouts[name].layer) is not None:
                of_layer[i, layer] = 1
        whole = [partition.tensor_names.index(name) for name in partition.whole_tensors]
        for c in self.criteria:
            tensors = self.changes["share", c, "tensor"]
            self.changes["share", c, "layer"] = tensors @ of_layer
            fine = tensors[:, whole].sum(-1)
            for kind in SLICED_KINDS:
                fine = fine + self.changes["share", c, kind].flatten(1).sum(-1)
            self.completeness[f"share/{c}"] = float(recovery(*self.in_units(c, fine))[0])
            for kind in self.request.kinds:
                self.fidelity[f"share/{c}/{kind}"] = Fidelity(
                    method="integrated-gradients", steps=steps
                )

    def _noise(self, estimand: Estimand) -> None:
        blocks = noise_blocks(self.recordings, estimand)
        for block, result in self._finished("noise floor", blocks):
            for c in self.criteria:
                units = self.in_units(c, result[c].double(), self._members(block))
                floor = float(recovery(*units)[0].abs().max())
                self.noise[c] = max(floor, self.noise.get(c, 0.0))

    def _affordable(self, estimand: Estimand, kind: FineKind) -> bool:
        recordings, dims = self.recordings, self.partition.dims
        layers = [i for i in range(dims.n_layers) if recordings.differs(estimand, kind, i)]
        cost = dims.count(kind) * sum(recordings.depth(layer) for layer in layers)
        return cost <= self.request.exact_budget

    def _exact_kinds(self, estimand: Estimand) -> list[Kind]:
        return [
            kind
            for kind in self.request.kinds
            if kind not in SLICED_KINDS or self._affordable(estimand, kind)
        ]

    def _all_of(self, estimand: Estimand, kind: Kind) -> list[list[int]]:
        """Indices by layer of every component of a kind that can change anything."""
        partition, n_layers = self.partition, self.partition.dims.n_layers
        if kind == "tensor":
            lists: list[list[int]] = [[] for _ in range(n_layers + 1)]
            for i, name in enumerate(partition.tensor_names):
                layer = partition.layouts[name].layer
                if self._tensor_differs(estimand, name):
                    lists[n_layers if layer is None else layer].append(i)
            return lists
        count = 1 if kind == "layer" else partition.dims.count(kind)
        differ = [self.recordings.differs(estimand, kind, i) for i in range(n_layers)]
        return [list(range(count)) if differ[i] else [] for i in range(n_layers)]

    def _tensor_differs(self, estimand: Estimand, name: str) -> bool:
        pair, layer = self.recordings.pair, self.partition.layouts[name].layer
        if name in pair.changed or not of_activations(estimand):
            return name in pair.changed
        if name in pair.entrance:
            return False
        return pair.diverges(self.partition.dims.n_layers - 1 if layer is None else layer)

    def _exact(self, estimand: Estimand) -> None:
        kinds = self._exact_kinds(estimand)
        selected = {kind: self._all_of(estimand, kind) for kind in kinds}
        for (c, kind), changes in self._swapped(estimand, selected, "exact").items():
            self.changes[estimand, c, kind] = changes
            self.fidelity[f"{estimand}/{c}/{kind}"] = Fidelity(method="exact")

    def _first_order(self, estimand: Estimand) -> None:
        exact = self._exact_kinds(estimand)
        kinds: list[FineKind] = [
            k for k in SLICED_KINDS if k in self.request.kinds and k not in exact
        ]
        if not kinds:
            return
        self._zeros(estimand, kinds)
        request = self.request
        blocks = first_order_blocks(
            self.recordings, estimand, kinds, request.seed, request.curvature
        )
        for block, result in self._finished(f"{estimand}, first-order", blocks):
            members = self._members(block)
            for c, kind, value in self._by_kind(result):
                key = estimand, c, kind
                self.changes[key][members] = value.transpose(0, 1).double()
                bent = result.get(f"{c}/{kind}{CURVATURE}")
                if bent is not None:
                    whole = self.curvature.setdefault(key, torch.zeros_like(self.changes[key]))
                    whole[members] = bent.transpose(0, 1).double()
        self._verify(estimand, kinds)

    def _doubtful(self, estimand: Estimand, c: CriterionName, kind: Kind) -> torch.Tensor:
        """How large an estimate may be: the sizes of first and second order, which may cancel."""
        changes = self.changes[estimand, c, kind]
        bent = self.curvature.get((estimand, c, kind))
        if bent is None:
            return self._recovered(estimand, c, changes)[0].abs()
        parts = (changes - bent, bent)
        return sum((self._recovered(estimand, c, part)[0].abs() for part in parts), torch.zeros(()))

    def _verify(self, estimand: Estimand, kinds: list[FineKind]) -> None:
        """Swap the leaders and a uniform sample exactly, compare, and keep what swaps gave."""
        recordings, k = self.recordings, self.request.verify
        top: dict[tuple[str, str], list[int]] = {}
        random: dict[str, list[int]] = {}
        chosen: dict[str, list[int]] = {}
        selected: dict[Kind, list[list[int]]] = {}
        n_layers = self.partition.dims.n_layers
        for kind in kinds:
            count = self.partition.dims.count(kind)
            changed = torch.tensor([recordings.differs(estimand, kind, i) for i in range(n_layers)])
            candidates = changed.unsqueeze(-1).expand(n_layers, count)
            random[kind] = uniform_sample(candidates, k, self.request.seed)
            for c in self.criteria:
                top[c, kind] = leaders(self._doubtful(estimand, c, kind), k)
            chosen[kind] = sorted(
                {*random[kind], *(i for c in self.criteria for i in top[c, kind])}
            )
            selected[kind] = [
                [i % count for i in chosen[kind] if i // count == layer]
                for layer in range(n_layers)
            ]
        exact = self._swapped(estimand, selected, "verify")
        for kind in kinds:
            for c in self.criteria:
                key = estimand, c, kind
                found = self._recovered(estimand, c, exact[c, kind])[0].flatten()
                method = self._closer(estimand, c, kind, found, chosen[kind])
                predicted = self.scores(*key)[0]
                stated = verdict(predicted, found, top[c, kind], random[kind], method)
                if chosen[kind]:
                    stated = stated.model_copy(update={"swapped": tuple(chosen[kind])})
                    at = torch.tensor(chosen[kind])
                    self.changes[key].flatten(1)[:, at] = exact[c, kind].flatten(1)[:, at]
                self.fidelity["/".join(key)] = stated

    def _closer(
        self,
        estimand: Estimand,
        c: CriterionName,
        kind: Kind,
        exact: torch.Tensor,
        swapped: list[int],
    ) -> ScoringMethod:
        """Leave the second order out where estimates come closer to what swaps gave without it."""
        key = estimand, c, kind
        if key not in self.curvature:
            return "first-order"
        first = self.changes[key] - self.curvature[key]
        errors = [
            (self._recovered(estimand, c, change)[0].flatten() - exact)[swapped].abs().sum()
            for change in (first, self.changes[key])
        ]
        if errors[0] < errors[1] and not flat(estimand, c):
            self.changes[key] = first
            return "first-order"
        return "second-order"

    def _swapped(
        self, estimand: Estimand, selected: Selected, sweep: Literal["exact", "verify"]
    ) -> dict[tuple[CriterionName, Kind], torch.Tensor]:
        """Changes ``[prompts, *shape of the kind]`` by real swaps of components, 0 elsewhere."""
        n_prompts = self.recordings.n_prompts
        changes = {
            (c, kind): torch.zeros((n_prompts, *self._shape(kind)), dtype=torch.float64)
            for kind in selected
            for c in self.criteria
        }
        stage = f"{estimand}, {'exact' if sweep == 'exact' else 'verifying'}"
        blocks = exact_blocks(self.recordings, estimand, selected, sweep)
        for block, result in self._finished(stage, blocks):
            members, chosen = self._members(block).unsqueeze(-1), dict(block.chosen)
            for c, kind, value in self._by_kind(result):
                indices = torch.tensor(chosen[kind])
                inside = (block.layer,) if kind == "layer" else (block.layer, indices)
                place = (indices,) if kind == "tensor" else inside
                changes[c, kind][members, *place] = value.T.double()
        return changes

    def scores(
        self, estimand: Estimand, c: CriterionName, kind: Kind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and standard errors from the changes."""
        return self._recovered(estimand, c, self.changes[estimand, c, kind])

    def quotients(
        self, estimand: Estimand, c: CriterionName, kind: Kind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What scores are quotients of: changes ``[*shape of the kind, prompts]``, and distances.

        A knockout's is what the criterion loses.
        """
        return self._quotients(estimand, c, self.changes[estimand, c, kind])

    def _quotients(
        self, estimand: Estimand, c: CriterionName, change: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        change = change.movedim(0, -1)
        # knockout = 1 - r(expert with c from the base): what the criterion loses
        return self.in_units(c, -change if of_knockout(estimand) else change)

    def _recovered(
        self, estimand: Estimand, c: CriterionName, change: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return recovery(*self._quotients(estimand, c, change))

    def in_units(
        self, c: CriterionName, change: torch.Tensor, members: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Changes ``[..., prompts]`` and the distances that they are divided by, as asked for.

        Args:
            c: the criterion.
            change: of all prompts, or of some.
            members: which these are.
        """
        distance = self._distance(c)
        distance = distance if members is None else distance[members]
        return per_prompt(change, distance) if self.by_prompt else (change, distance)

    @property
    def by_prompt(self) -> bool:
        """Whether every prompt is divided by its own distance."""
        return self.request.normalise == "prompt"

    @property
    def left_out(self) -> dict[CriterionName, tuple[int, ...]] | None:
        """Numbers, from 0, of the prompts without a gap to divide by; None where none is asked."""
        if not self.by_prompt:
            return None
        gone = {c: (~has_gap(self._distance(c))).nonzero().flatten() for c in self.criteria}
        return {c: tuple(members.tolist()) for c, members in gone.items()}
