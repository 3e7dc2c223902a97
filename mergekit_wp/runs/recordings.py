"""Recorded runs of the resident model on the prompts, and memory back-off over parts of them.

What is recorded serves all patches of a block, and of the blocks that follow on the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mergekit_wp.components import Partition
from mergekit_wp.criteria import Criteria, Targets, part_of
from mergekit_wp.engine.activation_swaps import activation_inputs
from mergekit_wp.engine.block_changes import Changes, block_inputs
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.donor import Donor
from mergekit_wp.engine.packing import Packing, TokenCost
from mergekit_wp.engine.replay import Receiver, last_layer, record
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.runs.references import References
from mergekit_wp.terms import (
    Estimand,
    FineKind,
    Kind,
    of_activations,
    of_knockout,
)

#: result tensors of a block, by "criterion/kind" or other names
Result = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Portion:
    """Some prompts of a batch.

    Attributes:
        batch: its number.
        start, stop: the prompts, by their place in the batch.
        at_once: sequences that go through the model together.
    """

    batch: int
    start: int
    stop: int
    at_once: int


class Recordings:
    """Runs of base and expert on the prompts; the last one is kept, for it is large.

    Args:
        resident: the model in memory.
        references: prompts, targets and reference values.
        criteria: which criteria to read.
    """

    def __init__(self, resident: ResidentModel, references: References, criteria: Criteria) -> None:
        self.resident, self.references, self.criteria = resident, references, criteria
        self.decoder = Decoder(resident.model)
        self._receiver: tuple[tuple[float, Portion, bool], Receiver] | None = None
        self._donor: Donor | None = None

    @property
    def pair(self) -> Pair:
        """Base and expert."""
        return self.resident.pair

    @property
    def partition(self) -> Partition:
        """The components."""
        return self.pair.partition

    @property
    def mapped(self) -> bool:
        """Whether the architecture has a component map."""
        return self.partition.dims.architecture.mapped

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return sum(batch.size for batch in self.references.batches)

    def prompts(self, portion: Portion) -> tuple[PromptBatch, Targets]:
        """Prompts, one a row, and what they are measured against."""
        batch = self.references.batches[portion.batch]
        targets = self.references.targets[portion.batch]
        return part_of(batch, targets, portion.start, portion.stop)

    def receiver(self, position: float, portion: Portion, *, packs: bool = True) -> Receiver:
        """The base (0) or the expert (1), which is then in memory, with its run on some prompts.

        Args:
            position: of the model.
            portion: the prompts.
            packs: what they begin with alike is there once, see `packing`.
        """
        self.resident.move_to(position)  # a kept run is of use with its own weights only
        key = (position, portion, packs)
        if self._receiver is None or self._receiver[0] != key:
            self._receiver = None
            batch, targets = self.prompts(portion)
            if packs:
                batch = self._packing.of(batch)
            with torch.no_grad():
                recording = record(self.decoder, batch)
            copies = self.copies(batch, portion.at_once)
            self._receiver = key, Receiver(self.decoder, recording, self.criteria, targets, copies)
        return self._receiver[1]

    def donor(self, position: float) -> Donor:
        """The other checkpoint of a receiver; the last one is kept."""
        if self._donor is None or self._donor.position != position:
            self._donor = Donor(self.resident, position)
        return self._donor

    def forget(self) -> None:
        """Free what was recorded."""
        self._receiver = self._donor = None

    def changes(
        self, estimand: Estimand, layer: int, receiver: Receiver, kinds: Sequence[FineKind]
    ) -> Mapping[FineKind, Changes]:
        """The changes that patches of some kinds, at least, make in one layer."""
        donor = self.donor(receiver_position(estimand))
        if of_activations(estimand):
            return activation_inputs(receiver, layer, donor, kinds)
        return block_inputs(receiver, layer, donor.layer(layer, kinds), kinds)

    def differs(self, estimand: Estimand, kind: Kind, layer: int) -> bool:
        """Whether exchanging a kind in a layer can change anything."""
        if of_activations(estimand):
            return self.pair.diverges(layer)
        return self.pair.differs(kind, layer)

    def copies(self, batch: PromptBatch, at_once: int) -> int:
        """Patches per replay: as many as fill the tokens of so many sequences."""
        width = max(padded.ids.shape[1] for padded in self.references.batches)
        return max(1, at_once * width // batch.ids.numel())

    def depth(self, layer: int) -> float:
        """Part of a forward pass that replaying from `layer` costs."""
        if not self.mapped:
            return 1.0
        last = last_layer(self.decoder, self.criteria, self.references.targets[0])
        return max(0, last - layer + 1) / self.partition.dims.n_layers

    @cached_property
    def _packing(self) -> Packing:
        hidden = int(self.pair.base.text_config.hidden_size)
        return Packing(self.decoder, TokenCost.in_layer(self.partition, hidden))


def receiver_position(estimand: Estimand) -> float:
    """Gains are measured from the base (0), knockouts from the expert (1)."""
    return 1.0 if of_knockout(estimand) else 0.0


def in_portions(
    recordings: Recordings,
    at_once: AtOnce,
    batch: int,
    work: Callable[[Portion], Result],
    prompts: int | None,
) -> Result:
    """What is computed on a batch, with fewer patches or prompts at once where memory runs out.

    Args:
        recordings: forgotten between portions.
        at_once: how many sequences fitted last.
        batch: its number.
        work: computes a portion, from its start.
        prompts: the dimension of its results that counts prompts; None where they are sums over
            these.

    Raises:
        OutOfMemory: there is not even memory for one sequence.
    """
    n = recordings.references.batches[batch].size

    def with_so_many(size: int) -> Result:
        if n <= size:
            return work(Portion(batch, 0, n, size))
        found: list[Result] = []
        try:
            for start in range(0, n, size):
                recordings.forget()
                part = work(Portion(batch, start, min(n, start + size), size))
                found.append({name: value.cpu() for name, value in part.items()})
        finally:
            recordings.forget()
        together = {name: [one[name] for one in found] for name in found[0]}
        if prompts is None:
            return {name: torch.stack(parts).sum(0) for name, parts in together.items()}
        return {name: torch.cat(parts, prompts) for name, parts in together.items()}

    return at_once.run(with_so_many)
