"""Compute a part of a circuit: a first-order screen, exact supplies, or one component's effects.

Results are changes per prompt; of a screen their sum over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

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
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.cluster import Assignment, SentModels, moved
from mergekit_wp.runs.recordings import Portion, Recordings, Result, in_portions
from mergekit_wp.runs.references import References
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
    """One supply to measure exactly: ``leading`` by the screen, ``drawn`` at random, or both."""

    target: Place
    via: Via
    source: Place
    screened: float
    leading: bool
    drawn: bool


@dataclass(frozen=True)
class Screen:
    """First-order supplies to every target, on one batch."""

    batch: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"screen.batch{self.batch:04d}"


@dataclass(frozen=True)
class Supply:
    """Exact supplies of some components of one layer, on one batch."""

    batch: int
    layer: int
    pairs: tuple[SupplyPair, ...]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"supplies.batch{self.batch:04d}.layer{self.layer:04d}"


@dataclass(frozen=True)
class Effect:
    """Gain, effect by activations and its direct part, of one component on one batch."""

    batch: int
    place: Place

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"effect.{self.place.name.replace(' ', '-')}.batch{self.batch:04d}"


class Supplies:
    """Computes the parts of one circuit, with fewer prompts at once where memory runs out.

    Args:
        recordings: of base and expert on the prompts.
        at_once: how many sequences go through the model together.
        targets: whose suppliers are looked for.
    """

    def __init__(self, recordings: Recordings, at_once: AtOnce, targets: Sequence[Place]) -> None:
        self.recordings, self.at_once, self.targets = recordings, at_once, targets
        self.dims, self.parallel = recordings.partition.dims, recordings.decoder.parallel
        [self.criterion] = recordings.criteria

    def __call__(self, part: Screen | Supply | Effect) -> Result:
        """Under ``changes`` those of every pair, ``[pairs, n]``, or of an effect, ``[3, n]``.

        Of a screen sums ``[layers, count]`` under ``target/via/kind``.
        """

        def work(portion: Portion) -> Result:
            if isinstance(part, Screen):
                return self._screen(portion)
            if isinstance(part, Supply):
                return self._supply(part.layer, part.pairs, portion)
            return self._effect(part.place, portion)

        prompts = None if isinstance(part, Screen) else 1
        return in_portions(self.recordings, self.at_once, part.batch, work, prompts)

    def reads(self, target: Place, source: Place) -> bool:
        """Whether a component supplies a target."""
        return target.reads(source, parallel=self.parallel)

    def _screen(self, portion: Portion) -> Result:
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
                        if not self.reads(target, Place(layer, kinds[0], 0)):
                            continue
                        there = at_block(receiver, layer, in_mlp, gradient)
                        for via, inputs in by_via.items():
                            for kind in set(kinds) & set(SUPPLIER_KINDS[via]):
                                change = inputs[kind].project(there).sum(0)
                                found[f"{t}/{via}/{kind}"][layer] = change.float().cpu()
        return found

    def _inputs(self, layer: int, receiver: Receiver) -> Mapping[Via, Mapping[FineKind, Changes]]:
        """Changes of a layer's components by weights and by activations, where there are any."""
        return {
            via: self.recordings.changes(estimand, layer, receiver, SLICED_KINDS)
            for via, estimand in _ESTIMAND.items()
            if self.recordings.differs(estimand, "layer", layer)
        }

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


@dataclass(frozen=True)
class Circuits(Assignment):
    """The parts of one circuit."""

    models: SentModels
    references: References
    criterion: CriterionName
    targets: tuple[Place, ...]
    batch_size: int

    def begin(self, told: Callable[[str], None]) -> Callable[[Screen | Supply | Effect], Result]:
        """Open the models."""
        [pair] = self.models.opened()
        resident = self.models.loaded(pair)
        references = moved(self.references, resident.device)
        recordings = Recordings(resident, references, (self.criterion,))
        at_once = AtOnce(self.batch_size, told, recordings.forget)
        return Supplies(recordings, at_once, self.targets)
