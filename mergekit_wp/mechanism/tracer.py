"""Screen, measure and name the supplies of one circuit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mergekit_wp.criteria import recovery
from mergekit_wp.engine.block_changes import Changes
from mergekit_wp.engine.gradients import criterion_gradients, record_with_gradients
from mergekit_wp.engine.paths import (
    Place,
    at_block,
    reaching,
    supplied,
    supply_gradient,
    written_to_the_end,
)
from mergekit_wp.engine.replay import Receiver
from mergekit_wp.engine.weight_swaps import written_anew
from mergekit_wp.files.circuitfile import Edge, Measured, Node
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.mechanism.roles import is_edge, role
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Portion, Recordings, Result, in_portions
from mergekit_wp.scoring.fidelity import verdict
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand, FineKind, Via

#: kinds that supply: a head writes what its keys and values let it, so these count beside it by
#: their weights only
SUPPLIER_KINDS: dict[Via, tuple[FineKind, ...]] = {
    "weights": ("head", "kv_group", "neuron"),
    "activations": ("head", "neuron"),
}
#: kinds that write into each block's output; whether that is the MLP
_BLOCKS: dict[bool, tuple[FineKind, ...]] = {False: ("head", "kv_group"), True: ("neuron",)}
_ESTIMAND: dict[Via, Estimand] = {"weights": "gain", "activations": "activation_gain"}


@dataclass(frozen=True)
class SupplyPair:
    """One supply to measure exactly; ``leading`` by the screen, else drawn at random."""

    target: Place
    via: Via
    source: Place
    screened: float
    leading: bool


class Tracer:
    """Screens, measures and names one circuit."""

    def __init__(
        self,
        request: TraceRequest,
        recordings: Recordings,
        at_once: AtOnce,
        criterion: CriterionName,
        targets: Sequence[Place],
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.recordings, self.at_once = request, recordings, at_once
        self.criterion, self.targets = criterion, targets
        self.journal, self.progress = journal, progress
        self.dims, self.parallel = recordings.partition.dims, recordings.decoder.parallel
        self.distance = recordings.references.values[criterion].distance.double()

    def circuit(self) -> tuple[tuple[Node, ...], tuple[Edge, ...], Fidelity]:
        """Nodes with their roles, all leading supplies, and how good the screen was."""
        screened = self._screen()
        pairs = list(self._pairs(screened))
        supplies = self._supplies(pairs)
        effects = self._effects(list(self.targets))
        edges = tuple(
            Edge(
                source=pair.source.name,
                target=pair.target.name,
                via=pair.via,
                supply=supply,
                screened=pair.screened,
                strong=is_edge(supply, effects[pair.target][1], self.request.rules),
            )
            for pair, supply in zip(pairs, supplies, strict=True)
            if pair.leading
        )
        places = {pair.source.name: pair.source for pair in pairs}
        sources = {places[e.source] for e in edges if e.strong} - set(self.targets)
        effects |= self._effects(sorted(sources))
        largest = max(activation.value for _, activation, _ in effects.values())
        nodes = []
        for place in sorted(effects):
            gain, activation, direct = effects[place]
            node = Node(
                kind=place.kind,
                layer=place.layer,
                index=place.index,
                name=place.name,
                target=place in self.targets,
                gain=gain,
                activation=activation,
                direct=direct,
            )
            if node.target:
                node = node.model_copy(update=self._totals(node, place, screened))
            found = role(node, edges, largest, self.dims.n_layers, self.request.rules)
            nodes.append(node.model_copy(update={"role": found}))
        return tuple(nodes), edges, self._fidelity(pairs, supplies)

    def _kept(
        self,
        key: str,
        cost: float,
        batch: int,
        work: Callable[[Portion], Result],
        prompts: int | None = 1,
    ) -> Result:
        """A result from the journal, or computed and kept there; see `in_portions`."""
        run = partial(in_portions, self.recordings, self.at_once, batch, work, prompts)
        found, resumed = self.journal.block(key, run)
        self.progress.advance(cost, resumed=resumed)
        return found

    def _measured(self, change: torch.Tensor) -> Measured:
        value, error = recovery(change, self.distance)
        known = bool(torch.isfinite(error))
        return Measured(value=float(value), se=float(error) if known else None)

    # --- first-order screen -------------------------------------------------------------------

    def _screen(self) -> dict[tuple[int, Via, FineKind], torch.Tensor]:
        """First-order supplies ``[layers, count]`` to each target, by via and kind."""
        every = self.recordings.references.batches
        last = max(target.layer for target in self.targets)
        self.progress.stage("screening suppliers", len(every) * (last + 1), "layer")
        total: dict[str, torch.Tensor] = {}
        for b in range(len(every)):
            found = self._kept(f"screen.batch{b:04d}", last + 1, b, self._screen_batch, None)
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + value.double()
        scale = self.recordings.n_prompts * float(self.distance.mean())
        return {
            (t, via, kind): total[f"{t}/{via}/{kind}"] / scale
            for t in range(len(self.targets))
            for via, kinds in SUPPLIER_KINDS.items()
            for kind in kinds
        }

    def _screen_batch(self, portion: Portion) -> Result:
        recordings, dims = self.recordings, self.dims
        recordings.resident.move_to(0.0)
        batch, targets = recordings.prompts(portion)
        with_graph = record_with_gradients(recordings.decoder, batch)
        gradients = criterion_gradients(
            Receiver(recordings.decoder, with_graph, (self.criterion,), targets)
        )[self.criterion]
        receiver = recordings.receiver(0.0, portion, packs=False)
        along = [supply_gradient(receiver, target, gradients) for target in self.targets]
        found = {
            f"{t}/{via}/{kind}": torch.zeros((dims.n_layers, dims.count(kind)))
            for t in range(len(self.targets))
            for via, kinds in SUPPLIER_KINDS.items()
            for kind in kinds
        }
        with torch.no_grad():
            for layer in range(max(target.layer for target in self.targets) + 1):
                by_via = self._inputs(layer, receiver)
                for t, (target, gradient) in enumerate(zip(self.targets, along, strict=True)):
                    if gradient is None:
                        continue
                    for in_mlp, kinds in _BLOCKS.items():
                        if not self._reads(target, Place(layer, kinds[0], 0)):
                            continue
                        there = at_block(receiver, layer, in_mlp, gradient)
                        for via, inputs in by_via.items():
                            for kind in set(kinds) & set(SUPPLIER_KINDS[via]):
                                change = inputs[kind].project(there).sum(0)
                                found[f"{t}/{via}/{kind}"][layer] = change.float().cpu()
        return found

    def _reads(self, target: Place, source: Place) -> bool:
        return target.reads(source, parallel=self.parallel)

    def _inputs(self, layer: int, receiver: Receiver) -> Mapping[Via, Mapping[FineKind, Changes]]:
        """Changes of a layer's components by weights and by activations, where there are any."""
        return {
            via: self.recordings.changes(estimand, layer, receiver, SLICED_KINDS)
            for via, estimand in _ESTIMAND.items()
            if self.recordings.differs(estimand, "layer", layer)
        }

    # --- exact supplies -----------------------------------------------------------------------

    def _pairs(
        self, screened: Mapping[tuple[int, Via, FineKind], torch.Tensor]
    ) -> Iterator[SupplyPair]:
        """The leading suppliers of every target, and random ones to judge the screen by."""
        generator = torch.Generator().manual_seed(self.request.seed)
        count = self.request.suppliers
        for t, target in enumerate(self.targets):
            for via, kinds in SUPPLIER_KINDS.items():
                places = [
                    (Place(layer, kind, 0), kind)
                    for kind in kinds
                    for layer in range(target.layer + 1)
                    if self._reads(target, Place(layer, kind, 0))
                ]
                if not places:
                    continue
                flat = torch.cat([screened[t, via, kind][p.layer] for p, kind in places])
                widths = [self.dims.count(kind) for _, kind in places]
                starts = torch.tensor([0, *widths]).cumsum(0)
                order = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
                top = [i for i in order.tolist() if flat[i] != 0]
                nonzero = flat.nonzero().flatten()
                drawn = nonzero[torch.randperm(len(nonzero), generator=generator)[:count]]
                for i in sorted({*top, *drawn.tolist()}):
                    which = int(torch.searchsorted(starts, i, right=True)) - 1
                    place, kind = places[which]
                    source = Place(place.layer, kind, i - int(starts[which]))
                    yield SupplyPair(target, via, source, float(flat[i]), i in set(top))

    def _supplies(self, pairs: Sequence[SupplyPair]) -> list[Measured]:
        """Exact supply of every pair."""
        changes = torch.zeros((len(pairs), self.recordings.n_prompts), dtype=torch.float64)
        by_layer: dict[int, list[int]] = {}
        for p, pair in enumerate(pairs):
            by_layer.setdefault(pair.source.layer, []).append(p)
        every = self.recordings.references.batches
        self.progress.stage("measuring supplies", len(every) * len(pairs), "path")
        for b, batch in enumerate(every):
            for layer, members in sorted(by_layer.items()):
                work = partial(self._supply, layer, [pairs[p] for p in members])
                key = f"supplies.batch{b:04d}.layer{layer:04d}"
                found = self._kept(key, len(members), b, work)
                rows = torch.tensor(members).unsqueeze(-1)
                changes[rows, batch.members] = found["changes"].double()
        return [self._measured(change) for change in changes]

    @torch.no_grad()
    def _supply(self, layer: int, pairs: Sequence[SupplyPair], portion: Portion) -> Result:
        receiver = self.recordings.receiver(0.0, portion, packs=False)
        own, copies = receiver.own[self.criterion], receiver.copies
        inputs = self._inputs(layer, receiver)
        found = torch.empty((len(pairs), receiver.batch.size), dtype=torch.float64)
        groups: dict[tuple[Place, Via, FineKind], list[int]] = {}
        for p, pair in enumerate(pairs):
            groups.setdefault((pair.target, pair.via, pair.source.kind), []).append(p)
        for (target, via, kind), members in groups.items():
            for start in range(0, len(members), copies):
                some = members[start : start + copies]
                change = inputs[via][kind].changes([pairs[p].source.index for p in some])
                reached = reaching(receiver, Place(layer, kind, 0), change)
                values = supplied(receiver, target, reached)
                found[some] = (values[self.criterion] - own).double().cpu()
        return {"changes": found}

    # --- nodes --------------------------------------------------------------------------------

    def _effects(self, places: Sequence[Place]) -> dict[Place, tuple[Measured, Measured, Measured]]:
        """Exact gain, effect by activations and its direct part of every component."""
        if not places:
            return {}
        changes = torch.zeros((len(places), 3, self.recordings.n_prompts), dtype=torch.float64)
        every = self.recordings.references.batches
        self.progress.stage("measuring components", len(every) * len(places), "component")
        for b, batch in enumerate(every):
            for p, place in enumerate(places):
                key = f"effect.{place.name.replace(' ', '-')}.batch{b:04d}"
                found = self._kept(key, 1, b, partial(self._effect, place))
                changes[p][:, batch.members] = found["changes"].double()
        return {
            place: (self._measured(of[0]), self._measured(of[1]), self._measured(of[2]))
            for place, of in zip(places, changes, strict=True)
        }

    @torch.no_grad()
    def _effect(self, place: Place, portion: Portion) -> Result:
        receiver = self.recordings.receiver(0.0, portion, packs=False)
        own = receiver.own[self.criterion]
        found = torch.zeros((3, receiver.batch.size), dtype=torch.float64)
        inputs = self._inputs(place.layer, receiver)
        vias: tuple[Via, ...] = ("weights", "activations", "activations")
        for row, via in enumerate(vias):
            if via not in inputs:
                continue
            change = inputs[via][place.kind].changes([place.index])
            if row < 2:
                values = written_anew(receiver, place.layer, place.kind, change)
            else:
                values = written_to_the_end(receiver, place, change)
            found[row] = (values[self.criterion][0] - own).double().cpu()
        return {"changes": found}

    def _totals(
        self,
        node: Node,
        target: Place,
        screened: Mapping[tuple[int, Via, FineKind], torch.Tensor],
    ) -> dict[str, float | int | None]:
        """How spread the supply is, and how much of the target's effect it accounts for."""
        t = self.targets.index(target)
        by_weights = torch.cat(
            [screened[t, "weights", kind].flatten() for kind in SUPPLIER_KINDS["weights"]]
        )
        mass = by_weights[by_weights > 0].sort(descending=True).values.cumsum(0)
        half = int(torch.searchsorted(mass, mass[-1] / 2)) + 1 if len(mass) else None
        written = sum(
            float(screened[t, "activations", kind].sum()) for kind in SUPPLIER_KINDS["activations"]
        )
        effect = node.activation.value
        accounted = (node.gain.value + written) / effect if effect else None
        return {"suppliers_for_half": half, "accounted": accounted}

    def _fidelity(self, pairs: Sequence[SupplyPair], supplies: Sequence[Measured]) -> Fidelity:
        predicted = torch.tensor([pair.screened for pair in pairs], dtype=torch.float64)
        exact = torch.tensor([supply.value for supply in supplies], dtype=torch.float64)
        top = [p for p, pair in enumerate(pairs) if pair.leading]
        drawn = [p for p, pair in enumerate(pairs) if not pair.leading]
        return verdict(predicted, exact, top, drawn, "first-order")
