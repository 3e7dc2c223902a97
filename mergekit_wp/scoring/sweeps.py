"""Run the sweeps of one request, and collect every component's change per prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from mergekit_wp.criteria import fisher_at_expert, recovery
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result, SweepContext, criterion_and_kind
from mergekit_wp.scoring.cluster import Cluster, Sweep
from mergekit_wp.scoring.exact import exact_blocks, noise_blocks
from mergekit_wp.scoring.fidelity import leaders, uniform_sample, verdict
from mergekit_wp.scoring.first_order import first_order_blocks
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.shares import share_blocks
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


class SweepRun:
    """The sweeps of one request, and the changes they found.

    ``changes[estimand, criterion, kind]`` is ``[prompts, *shape of the kind]``.
    """

    def __init__(
        self,
        request: ScoreRequest,
        context: SweepContext,
        journal: Journal,
        progress: Progress,
        cluster: Cluster | None = None,
    ) -> None:
        self.request, self.context = request, context
        self.journal, self.progress, self.cluster = journal, progress, cluster
        self.changes: dict[tuple[Estimand, CriterionName, Kind], torch.Tensor] = {}
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

    def _finished(self, name: str, sweep: Sweep) -> Iterator[tuple[str, Result]]:
        """Run a sweep's blocks, or take them from the journal; by key, in the sweep's order."""
        listed = list(sweep(self.context))
        if listed:
            self.progress.stage(name, sum(block.cost for block in listed), "forward")
        computed = set()
        if self.cluster is not None:
            costs = {b.key: b.cost for b in listed if not self.journal.has(b.key)}
            computed = set(costs)

            def keep(key: str, result: Result) -> None:
                self.journal.save(key, result)
                self.progress.advance(costs[key])

            self.cluster.run(sweep, list(costs), keep)
        for block in listed:
            run = partial(self.context.fitting, block, self.progress.note)
            result, resumed = self.journal.block(block.key, run)
            yield block.key, result
            if block.key not in computed:
                self.progress.advance(block.cost, resumed=resumed)

    def _shape(self, kind: Kind) -> tuple[int, ...]:
        dims = self.context.partition.dims
        if kind == "layer":
            return (dims.n_layers,)
        if kind == "tensor":
            return (len(self.context.partition.tensor_names),)
        return (dims.n_layers, dims.count(kind))

    def _zeros(self, estimand: Estimand, kinds: Iterable[Kind]) -> None:
        for kind in kinds:
            for c in self.context.criteria:
                shape = (self.context.n_prompts, *self._shape(kind))
                self.changes[estimand, c, kind] = torch.zeros(shape, dtype=torch.float64)

    def _members(self, key: str) -> torch.Tensor:
        number = next(part for part in key.split(".") if part.startswith("batch"))
        return self.context.references.batches[int(number[5:])].members

    def _share(self) -> None:
        self._zeros("share", KINDS)
        steps = self.request.share_steps
        for key, result in self._finished("share", partial(share_blocks, steps=steps)):
            members = self._members(key)
            for name, value in result.items():
                c, kind = criterion_and_kind(name)
                self.changes["share", c, kind][members] += value.double() / steps
        partition = self.context.partition
        of_layer = torch.zeros((len(partition.tensor_names), partition.dims.n_layers)).double()
        for i, name in enumerate(partition.tensor_names):
            if (layer := partition.layouts[name].layer) is not None:
                of_layer[i, layer] = 1
        whole = [partition.tensor_names.index(name) for name in partition.whole_tensors]
        for c in self.context.criteria:
            tensors = self.changes["share", c, "tensor"]
            self.changes["share", c, "layer"] = tensors @ of_layer
            distance = self.context.references.values[c].distance.double()
            fine = tensors[:, whole].sum(-1)
            for kind in SLICED_KINDS:
                fine = fine + self.changes["share", c, kind].flatten(1).sum(-1)
            self.completeness[f"share/{c}"] = float(fine.mean() / distance.mean())
            for kind in self.request.kinds:
                self.fidelity[f"share/{c}/{kind}"] = Fidelity(
                    method="integrated-gradients", steps=steps
                )

    def _noise(self, estimand: Estimand) -> None:
        sweep = partial(noise_blocks, estimand=estimand)
        for _, result in self._finished("noise floor", sweep):
            members = self.context.references.batches[0].members
            for c in self.context.criteria:
                change = result[c]
                distance = self.context.references.values[c].distance[members].double()
                floor = float((change.double().mean(-1) / distance.mean()).abs().max())
                self.noise[c] = max(floor, self.noise.get(c, 0.0))

    def _affordable(self, estimand: Estimand, kind: FineKind) -> bool:
        context, dims = self.context, self.context.partition.dims
        layers = [i for i in range(dims.n_layers) if context.differs(estimand, kind, i)]
        cost = dims.count(kind) * sum(context.depth(layer) for layer in layers)
        return cost <= self.request.exact_budget

    def _exact_kinds(self, estimand: Estimand) -> list[Kind]:
        return [
            kind
            for kind in self.request.kinds
            if kind not in SLICED_KINDS or self._affordable(estimand, kind)
        ]

    def _all_of(self, estimand: Estimand, kind: Kind) -> list[list[int]]:
        """Indices by layer of every component of a kind that can change anything."""
        context, partition = self.context, self.context.partition
        n_layers = partition.dims.n_layers
        if kind == "tensor":
            lists: list[list[int]] = [[] for _ in range(n_layers + 1)]
            for i, name in enumerate(partition.tensor_names):
                layer = partition.layouts[name].layer
                if self._tensor_differs(estimand, name):
                    lists[n_layers if layer is None else layer].append(i)
            return lists
        count = 1 if kind == "layer" else partition.dims.count(kind)
        differ = [context.differs(estimand, kind, i) for i in range(n_layers)]
        return [list(range(count)) if differ[i] else [] for i in range(n_layers)]

    def _tensor_differs(self, estimand: Estimand, name: str) -> bool:
        context, layer = self.context, self.context.partition.layouts[name].layer
        if name in context.resident.pair.changed or not of_activations(estimand):
            return name in context.resident.pair.changed
        if name in context.entrance:
            return False
        n_layers = context.partition.dims.n_layers
        return context.differs(estimand, "layer", n_layers - 1 if layer is None else layer)

    def _exact(self, estimand: Estimand) -> None:
        kinds = self._exact_kinds(estimand)
        self._zeros(estimand, kinds)
        selected = {kind: self._all_of(estimand, kind) for kind in kinds}
        sweep = partial(exact_blocks, estimand=estimand, selected=selected, label="exact")
        for key, result in self._finished(f"{estimand}, exact", sweep):
            members, layer = self._members(key), int(key.split(".layer")[-1])
            for name, value in result.items():
                c, kind = criterion_and_kind(name)
                target = self.changes[estimand, c, kind]
                indices = selected[kind][layer]
                rows = value.T.double()
                if kind == "tensor":
                    target[members.unsqueeze(-1), torch.tensor(indices)] = rows
                elif kind == "layer":
                    target[members, layer] = rows[:, 0]
                else:
                    target[members.unsqueeze(-1), layer, torch.tensor(indices)] = rows
        for kind in kinds:
            for c in self.context.criteria:
                self.fidelity[f"{estimand}/{c}/{kind}"] = Fidelity(method="exact")

    def _first_order(self, estimand: Estimand) -> None:
        exact = self._exact_kinds(estimand)
        kinds: list[FineKind] = [
            k for k in SLICED_KINDS if k in self.request.kinds and k not in exact
        ]
        if not kinds:
            return
        self._zeros(estimand, kinds)
        seed = self.request.seed
        sweep = partial(first_order_blocks, estimand=estimand, kinds=kinds, seed=seed)
        for key, result in self._finished(f"{estimand}, first-order", sweep):
            members = self._members(key)
            for name, value in result.items():
                c, kind = criterion_and_kind(name)
                self.changes[estimand, c, kind][members] = value.transpose(0, 1).double()
        self._verify(estimand, kinds)

    def _verify(self, estimand: Estimand, kinds: list[FineKind]) -> None:
        """Swap the leaders and a uniform sample exactly, and compare."""
        context, k = self.context, self.request.verify
        top: dict[tuple[str, str], list[int]] = {}
        random: dict[str, list[int]] = {}
        selected: dict[Kind, list[list[int]]] = {}
        n_layers = context.partition.dims.n_layers
        for kind in kinds:
            count = context.partition.dims.count(kind)
            changed = torch.tensor([context.differs(estimand, kind, i) for i in range(n_layers)])
            candidates = changed.unsqueeze(-1).expand(n_layers, count)
            random[kind] = uniform_sample(candidates, k, self.request.seed)
            for c in context.criteria:
                top[c, kind] = leaders(self.scores(estimand, c, kind)[0], k)
            chosen = {*random[kind], *(i for c in context.criteria for i in top[c, kind])}
            selected[kind] = [
                sorted(i % count for i in chosen if i // count == layer)
                for layer in range(n_layers)
            ]
        exact = self._swapped(estimand, selected)
        for kind in kinds:
            for c in context.criteria:
                second = of_knockout(estimand) and fisher_at_expert(c)
                method: ScoringMethod = "second-order" if second else "first-order"
                predicted = self.scores(estimand, c, kind)[0]
                self.fidelity[f"{estimand}/{c}/{kind}"] = verdict(
                    predicted, exact[c, kind], top[c, kind], random[kind], method
                )

    def _swapped(
        self, estimand: Estimand, selected: dict[Kind, list[list[int]]]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """Exact scores of selected components, zero elsewhere, flat, by criterion and kind."""
        context, criteria = self.context, self.context.criteria
        changes = {
            (c, kind): torch.zeros((*self._shape(kind), context.n_prompts), dtype=torch.float64)
            for kind in selected
            for c in criteria
        }
        sweep = partial(exact_blocks, estimand=estimand, selected=selected, label="verify")
        for key, result in self._finished(f"{estimand}, verifying", sweep):
            members, layer = self._members(key), int(key.split(".layer")[-1])
            for kind, lists in selected.items():
                if not lists[layer]:
                    continue
                for c in criteria:
                    rows = torch.tensor(lists[layer]).unsqueeze(-1)
                    changes[c, kind][layer, rows, members] = result[f"{c}/{kind}"].double()
        sign = -1.0 if of_knockout(estimand) else 1.0
        return {
            (c, kind): sign
            * (change.mean(-1) / context.references.values[c].distance.double().mean()).flatten()
            for (c, kind), change in changes.items()
        }

    def scores(
        self, estimand: Estimand, c: CriterionName, kind: Kind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and standard errors from the changes."""
        change = self.changes[estimand, c, kind].movedim(0, -1)
        # knockout = 1 - r(expert with c from the base): what the criterion loses
        change = -change if of_knockout(estimand) else change
        return recovery(change, self.context.references.values[c].distance.double())
