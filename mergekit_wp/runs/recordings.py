"""What the blocks of a sweep share: models, prompts, references and what was recorded last.

A block is the smallest piece that is kept when a run is killed: one layer's patches on one batch
of prompts, one first-order pass, or one step of the share integral. Results are changes per
prompt, so that standard errors can be taken at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch

from mergekit_wp.components import Partition
from mergekit_wp.criteria import Criteria, Targets, target_part
from mergekit_wp.engine.activation_swaps import DonorRun, activation_inputs, donor_run
from mergekit_wp.engine.block_changes import Changes, LayerWeights, block_inputs
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.packing import TokenCost, packed
from mergekit_wp.engine.replay import Trace, last_layer, own_values, record
from mergekit_wp.models.backoff import fitting
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.runs.references import References
from mergekit_wp.terms import (
    SLICED_KINDS,
    CriterionName,
    Estimand,
    FineKind,
    Kind,
    of_activations,
    of_knockout,
)

#: result tensors of a block, ``[components, prompts of the batch]`` by "criterion/kind/..." key
Result = dict[str, torch.Tensor]


def criterion_and_kind(key: str) -> tuple[CriterionName, Kind]:
    """Take a result's key apart."""
    criterion, kind = key.split("/")
    return criterion, cast(Kind, kind)


@dataclass(frozen=True)
class Block:
    """One resumable piece of work; cost is in forward passes over all prompts.

    ``prompts`` is the dimension of its results that counts the prompts of batch ``b``; None where
    they are sums over these.
    """

    key: str
    cost: float
    run: Callable[[], Result]
    b: int = 0
    prompts: int | None = 1


@dataclass
class SweepContext:
    """What all sweeps share.

    Attributes:
        resident: the model in memory.
        references: prompts, targets and reference values.
        criteria: which criteria to read.
        batch_size: sequences per forward.
        part: of the prompts of every batch that `batch` and `targets` are of; None for all.
    """

    resident: ResidentModel
    references: References
    criteria: Criteria
    batch_size: int
    part: tuple[int, int] | None = None
    _traces: dict[tuple[float, int, bool], Trace] = field(default_factory=dict)
    _donor_run: tuple[float, PromptBatch, DonorRun] | None = None
    _own: tuple[Trace, dict[CriterionName, torch.Tensor]] | None = None

    @property
    def decoder(self) -> Decoder:
        """The resident model's parts."""
        return Decoder(self.resident.model)

    @property
    def partition(self) -> Partition:
        """The components."""
        return self.resident.pair.partition

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return sum(batch.size for batch in self.references.batches)

    def batch(self, b: int) -> PromptBatch:
        """Batch b, or the present part of it."""
        whole = self.references.batches[b]
        return whole if self.part is None else whole.part(*self.part)

    def targets(self, b: int) -> Targets:
        """What it is measured against."""
        batch, whole = self.references.batches[b], self.references.targets[b]
        return whole if self.part is None else target_part(batch, whole, *self.part)

    def fitting(self, block: Block, told: Callable[[str], None]) -> Result:
        """A block's result, with fewer patches or prompts at once wherever memory runs out.

        Args:
            block: to run.
            told: of every step back.

        Raises:
            UserError: there is not even memory for one sequence.
        """
        n = self.references.batches[block.b].size

        def run(size: int) -> Result:
            self.batch_size = size
            return block.run() if n <= size else self._in_parts(block, n)

        _, found = fitting(self.batch_size, run, told, self.forget)
        return found

    def _in_parts(self, block: Block, n: int) -> Result:
        found: list[Result] = []
        try:
            for start in range(0, n, self.batch_size):
                self.part = (start, min(n, start + self.batch_size))
                self.forget()
                found.append({key: value.cpu() for key, value in block.run().items()})
        finally:
            self.part = None
            self.forget()
        together = {key: [one[key] for one in found] for key in found[0]}
        if block.prompts is None:
            return {key: torch.stack(parts).sum(0) for key, parts in together.items()}
        return {key: torch.cat(parts, block.prompts) for key, parts in together.items()}

    def forget(self) -> None:
        """Free what was recorded."""
        self._traces.clear()
        self._donor_run = self._own = None

    def weight_of(self, batch: PromptBatch) -> float:
        """The batch's part of all prompts."""
        return batch.size / self.n_prompts

    def copies(self, batch: PromptBatch) -> int:
        """Patches per replay: as many as fill the batch size's tokens."""
        width = max(padded.ids.shape[1] for padded in self.references.batches)
        return max(1, self.batch_size * width // batch.ids.numel())

    def trace(self, position: float, b: int) -> Trace:
        """The recorded run of the base (0) or the expert (1) on batch b; one is kept."""
        return self._recorded(position, b, packs=False)

    def packed_trace(self, position: float, b: int) -> Trace:
        """The same for sweeps: what prompts begin with alike is there once, see `packing`."""
        return self._recorded(position, b, packs=True)

    def own(self, trace: Trace, b: int) -> dict[CriterionName, torch.Tensor]:
        """Values ``[n]`` of a recorded run itself; those of the last one are kept."""
        if self._own is None or self._own[0] is not trace:
            self._own = trace, own_values(self.decoder, trace, self.criteria, self.targets(b))
        return self._own[1]

    def _recorded(self, position: float, b: int, *, packs: bool) -> Trace:
        self.resident.move_to(position)  # a kept trace is of use with its own weights only
        if (position, b, packs) not in self._traces:
            self._traces.clear()
            self._own = None
            batch = self._packed(b) if packs else self.batch(b)
            with torch.no_grad():
                self._traces[position, b, packs] = record(self.decoder, batch)
        return self._traces[position, b, packs]

    def _packed(self, b: int) -> PromptBatch:
        batch, shapes = self.batch(b), self.partition.shapes
        if not self._plainly_causal:
            return batch
        matrices = [shapes[name] for name in self.partition.layer_tensors(0)]
        weights = 2.0 * sum(math.prod(shape) for shape in matrices)
        hidden = int(self.resident.pair.base.text_config.hidden_size)
        return packed(batch, TokenCost(weights, 4.0 * hidden))

    @cached_property
    def _plainly_causal(self) -> bool:
        """Whether every token sees all tokens before it, so that a mask can say who they are.

        A sliding window shorter than the prompts, or attention biased by distance, comes to the
        layers as a mask of its own. Of a model without a map nothing is known.
        """
        if not self.mapped:
            return False
        widest = max(self.references.batches, key=lambda batch: batch.ids.shape[1])
        with torch.no_grad():
            calls = record(self.decoder, widest.part(0, 1)).calls
        return all(
            call.kwargs.get("attention_mask", "unknown") is None and "alibi" not in call.kwargs
            for call in calls
        )

    def donor(self, position: float, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the other checkpoint."""
        pair = self.resident.pair
        source = pair.expert if position == 0.0 else pair.base
        return {n: source.tensor(n, self.resident.dtype, self.resident.device) for n in names}

    def layer_state(self, position: float, layer: int) -> LayerWeights:
        """The donor's weights of one layer, by name within the layer."""
        names = list(self.partition.layer_tensors(layer))
        return {self.within(n): t for n, t in self.donor(position, names).items()}

    def _state_for(self, position: float, layer: int, kinds: Sequence[FineKind]) -> LayerWeights:
        """Of the donor's weights of one layer, those that some kinds compute with."""
        names = {self.within(n): n for n in self.partition.layer_tensors(layer)}
        architecture = self.partition.dims.architecture
        used = {n for k in kinds for n in (*architecture.read_by(k, names), architecture.out(k))}
        found = self.donor(position, [names[n] for n in names if n in used])
        return {self.within(n): t for n, t in found.items()}

    def within(self, name: str) -> str:
        """A tensor's name within its layer."""
        place = self.partition.dims.architecture.within_layer(name)
        assert place is not None
        return place[1]

    @property
    def entrance(self) -> list[str]:
        """Tensors that make what enters the first layer."""
        enters = self.partition.dims.architecture.enters
        return [name for name in self.partition.tensor_names if enters(name)]

    def donor_run(self, position: float, trace: Trace) -> DonorRun:
        """The other checkpoint's run on a trace's batch, packed or not; one is kept."""
        if self._donor_run is not None:
            at, batch, run = self._donor_run
            if at == position and batch is trace.batch:
                return run
        self._donor_run = None
        entrance = self.donor(position, self.entrance)
        with torch.no_grad():
            run = donor_run(self.decoder, trace, entrance, lambda i: self.layer_state(position, i))
        self._donor_run = (position, trace.batch, run)
        return run

    def inputs(
        self,
        estimand: Estimand,
        layer: int,
        trace: Trace,
        kinds: Sequence[FineKind] = SLICED_KINDS,
    ) -> Mapping[FineKind, Changes]:
        """The changes that patches of some kinds, at least, make in one layer."""
        position, dims = receiver_position(estimand), self.partition.dims
        if not of_activations(estimand):
            state = self._state_for(position, layer, kinds)
            return block_inputs(self.decoder, layer, trace, state, dims, kinds)
        state = self.layer_state(position, layer)
        run = self.donor_run(position, trace)
        return activation_inputs(self.decoder, layer, trace, run, state, dims)

    def differs(self, estimand: Estimand, kind: Kind, layer: int) -> bool:
        """Whether exchanging a kind in a layer can change anything."""
        if not of_activations(estimand):
            return self.changed(kind, layer)
        if self.resident.pair.changed.intersection(self.entrance):
            return True
        return any(self.changed("layer", below) for below in range(layer + 1))

    def changed(self, kind: Kind, layer: int) -> bool:
        """Whether base and expert differ in any tensor of a kind in a layer."""
        changed = self.resident.pair.changed
        if kind in SLICED_KINDS:
            return any(t.name in changed for t in self.partition.owned_by(kind, layer))
        return any(name in changed for name in self.partition.layer_tensors(layer))

    @property
    def mapped(self) -> bool:
        """Whether the architecture has a component map."""
        return self.partition.dims.architecture.mapped

    def depth(self, layer: int) -> float:
        """Part of a forward pass that replaying from `layer` costs."""
        if not self.mapped:
            return 1.0
        last = last_layer(self.decoder, self.criteria, self.references.targets[0])
        return max(0, last - layer + 1) / self.partition.dims.n_layers


def receiver_position(estimand: Estimand) -> float:
    """Gains are measured from the base (0), knockouts from the expert (1)."""
    return 1.0 if of_knockout(estimand) else 0.0
