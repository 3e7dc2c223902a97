"""A sweep: every component's change of the criteria, block by block.

A block is the smallest piece that is kept when a run is killed: one layer's patches on one batch
of prompts, one first-order pass, or one step of the share integral. Results are changes per
prompt, so that standard errors can be taken at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import cast

import torch

from mergekit_wp.backoff import fitting
from mergekit_wp.components import SLICED_KINDS, FineKind, Kind, Partition
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.activations import (
    DonorRun,
    activation_inputs,
    donor_run,
    put_layer,
    put_modules,
    put_outside_layers,
)
from mergekit_wp.engine.gradients import (
    PROBES,
    PROBES_AT_ONCE,
    BlockGradients,
    criterion_gradients,
    probe_gradients,
    project,
    record_with_gradients,
)
from mergekit_wp.engine.local import Changes, State, block_inputs
from mergekit_wp.engine.packing import TokenCost, packed
from mergekit_wp.engine.patches import (
    Values,
    identity,
    joined,
    swap_layer_weights,
    swap_outside_layers,
    swap_slices,
)
from mergekit_wp.engine.share import Contributions, TaskVector, contributions, midpoints
from mergekit_wp.engine.trace import Criteria, Decoder, Trace, last_layer, own_values, record
from mergekit_wp.pair import Pair
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.resident import ResidentModel
from mergekit_wp.scorefile import CriterionName, Estimand, of_activations, of_knockout
from mergekit_wp.scoring.parts import target_part
from mergekit_wp.scoring.references import References
from mergekit_wp.scoring.whole import Chosen, swap_for_itself, swap_whole

#: result tensors of a block, ``[components, prompts of the batch]`` by "criterion/kind/..." key
Result = dict[str, torch.Tensor]


def criterion_and_kind(key: str) -> tuple[CriterionName, Kind]:
    """Take a result's key apart."""
    criterion, kind = key.split("/")
    return cast(CriterionName, criterion), cast(Kind, kind)


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
        self._donor_run = None

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

    def _recorded(self, position: float, b: int, *, packs: bool) -> Trace:
        self.resident.move_to(position)  # a kept trace is of use with its own weights only
        if (position, b, packs) not in self._traces:
            self._traces.clear()
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
            call.kwargs.get("attention_mask") is None and "alibi" not in call.kwargs
            for call in calls
        )

    def donor(self, position: float, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the other checkpoint."""
        pair = self.resident.pair
        source = pair.expert if position == 0.0 else pair.base
        return {n: source.tensor(n, self.resident.dtype, self.resident.device) for n in names}

    def layer_state(self, position: float, layer: int) -> State:
        """The donor's weights of one layer, by name within the layer."""
        names = list(self.partition.layer_tensors(layer))
        return {self.within(n): t for n, t in self.donor(position, names).items()}

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

    def inputs(self, estimand: Estimand, layer: int, trace: Trace) -> dict[FineKind, Changes]:
        """The changes that patches of heads, K/V groups and neurons make in one layer."""
        position, dims = receiver_position(estimand), self.partition.dims
        state = self.layer_state(position, layer)
        if not of_activations(estimand):
            return block_inputs(self.decoder, layer, trace, state, dims)
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


def exact_blocks(
    context: SweepContext,
    estimand: Estimand,
    selected: dict[Kind, list[list[int]]],
    label: str,
) -> Iterator[Block]:
    """Exact patches of chosen components.

    Args:
        context: the sweep.
        estimand: a gain or a knockout, of weights or of activations.
        selected: per kind, per layer, the indices to swap; for ``layer`` the index is 0. Tensors
            outside the layers stand under kind ``tensor`` in an extra, last list, as positions in
            `Partition.tensor_names`; so do those inside.
        label: names the blocks.

    Yields:
        Blocks whose results hold changes ``[C, n]`` under ``criterion/kind``.
    """
    patch = _put if of_activations(estimand) else _swap
    if not context.mapped:
        patch = swap_whole
    n_layers = context.partition.dims.n_layers
    for b, batch in enumerate(context.references.batches):
        weight = context.weight_of(batch)
        for layer in [*range(n_layers), n_layers]:
            chosen = {kind: lists[layer] for kind, lists in selected.items() if layer < len(lists)}
            chosen = {kind: indices for kind, indices in chosen.items() if indices}
            if not chosen:
                continue
            count = sum(len(indices) for indices in chosen.values())
            depth = context.depth(layer) if layer < n_layers else 1.0
            if depth == 0:  # above the last layer that matters: nothing changes
                continue
            yield Block(
                key=f"{label}.{estimand}.batch{b:04d}.layer{layer:04d}",
                cost=count * depth * weight,
                run=lambda b=b, layer=layer, chosen=chosen: _patch(  # type: ignore[misc]
                    context, estimand, b, layer, chosen, patch
                ),
                b=b,
            )


CoarsePatch = Callable[[SweepContext, float, int, Trace, int, Chosen], dict[Kind, Values]]


@torch.no_grad()
def _patch(
    context: SweepContext,
    estimand: Estimand,
    b: int,
    layer: int,
    chosen: Chosen,
    coarse: CoarsePatch,
) -> Result:
    """Heads, K/V groups and neurons alike for weights and activations; the rest by `coarse`."""
    position = receiver_position(estimand)
    trace = context.packed_trace(position, b)
    targets = context.targets(b)
    decoder, criteria = context.decoder, context.criteria
    own = own_values(decoder, trace, criteria, targets)
    found: dict[Kind, Values] = {}
    if sliced := [kind for kind in SLICED_KINDS if kind in chosen]:
        inputs = context.inputs(estimand, layer, trace)
        for kind in sliced:
            found[kind] = swap_slices(
                decoder,
                layer,
                trace,
                kind,
                inputs[kind],
                chosen[kind],
                criteria,
                targets,
                context.copies(trace.batch),
            )
    if set(chosen) & {"layer", "tensor"}:
        found |= coarse(context, position, b, trace, layer, chosen)
    return {f"{c}/{kind}": v[c] - own[c] for kind, v in found.items() for c in criteria}


def _swap(
    context: SweepContext, position: float, b: int, trace: Trace, layer: int, chosen: Chosen
) -> dict[Kind, Values]:
    """Weights of a layer and of whole tensors."""
    targets = context.targets(b)
    decoder, criteria = context.decoder, context.criteria
    if layer == context.partition.dims.n_layers:
        names = [context.partition.tensor_names[i] for i in chosen["tensor"]]
        parts = [
            swap_outside_layers(decoder, trace, name, weight, criteria, targets)
            for name, weight in context.donor(position, names).items()
        ]
        return {"tensor": joined(parts, criteria)}
    state = context.layer_state(position, layer)
    swaps: list[State] = [state] if "layer" in chosen else []
    swaps += [{name: state[name]} for name in _names_within(context, chosen)]
    copies = context.copies(trace.batch)
    values = swap_layer_weights(decoder, layer, trace, swaps, criteria, targets, copies)
    found: dict[Kind, Values] = {}
    if "layer" in chosen:
        found["layer"] = {c: v[:1] for c, v in values.items()}
        values = {c: v[1:] for c, v in values.items()}
    if "tensor" in chosen:
        found["tensor"] = values
    return found


def _put(
    context: SweepContext, position: float, b: int, trace: Trace, layer: int, chosen: Chosen
) -> dict[Kind, Values]:
    """Activations of a layer and of the modules that whole tensors belong to."""
    targets = context.targets(b)
    decoder, criteria = context.decoder, context.criteria
    donor = context.donor_run(position, trace)
    if layer == context.partition.dims.n_layers:

        def donor_tensor(name: str) -> torch.Tensor:
            return context.donor(position, [name])[name]

        names = [context.partition.tensor_names[i] for i in chosen["tensor"]]
        parts = [
            put_outside_layers(decoder, trace, donor, donor_tensor, name, criteria, targets)
            for name in names
        ]
        return {"tensor": joined(parts, criteria)}
    found: dict[Kind, Values] = {}
    if "layer" in chosen:
        found["layer"] = put_layer(decoder, layer, trace, donor, criteria, targets)
    if names := _names_within(context, chosen):
        state = context.layer_state(position, layer)
        copies = context.copies(trace.batch)
        found["tensor"] = put_modules(
            decoder, layer, trace, donor, state, names, criteria, targets, copies
        )
    return found


def _names_within(context: SweepContext, chosen: Chosen) -> list[str]:
    """Chosen tensors of one layer by their names within it."""
    names = context.partition.tensor_names
    return [context.within(names[i]) for i in chosen.get("tensor", [])]


def first_order_blocks(
    context: SweepContext, estimand: Estimand, kinds: list[FineKind], seed: int
) -> Iterator[Block]:
    """Exact-local, linear-downstream changes of whole kinds.

    Yields:
        Blocks whose results hold changes ``[layers, n, count]`` under ``criterion/kind``.
    """
    for b, batch in enumerate(context.references.batches):
        passes = 3 + 2 * len(context.criteria) + (2 * PROBES if of_knockout(estimand) else 0)
        yield Block(
            key=f"first-order.{estimand}.batch{b:04d}",
            cost=passes * context.weight_of(batch),
            run=lambda b=b: _first_order(context, estimand, b, kinds, seed),  # type: ignore[misc]
            b=b,
        )


def _first_order(
    context: SweepContext, estimand: Estimand, b: int, kinds: list[FineKind], seed: int
) -> Result:
    context.resident.move_to(receiver_position(estimand))
    decoder, batch = context.decoder, context.batch(b)
    trace = record_with_gradients(decoder, batch)
    dims = context.partition.dims
    found: Result = {
        f"{c}/{kind}": torch.zeros((dims.n_layers, batch.size, dims.count(kind))).double()
        for kind in kinds
        for c in context.criteria
    }
    for terms in _gradient_terms(context, estimand, b, trace, seed):
        with torch.no_grad():
            for layer in range(dims.n_layers):
                changed = [kind for kind in kinds if context.differs(estimand, kind, layer)]
                if not changed:
                    continue
                inputs = context.inputs(estimand, layer, trace)
                wanted = {kind: inputs[kind] for kind in changed}
                for criterion, gradients, squared in terms:
                    for kind, change in project(gradients, wanted, layer, batch.size).items():
                        change = change.cpu().double()
                        # KL is half the probes' mean square, and v = -KL
                        term = -change.square() / (2 * PROBES) if squared else change
                        found[f"{criterion}/{kind}"][layer] += term
                del inputs, wanted  # the donor's weights of one layer at a time
    return found


def _gradient_terms(
    context: SweepContext, estimand: Estimand, b: int, trace: Trace, seed: int
) -> Iterator[list[tuple[CriterionName, BlockGradients, bool]]]:
    """Criterion, gradients and whether the projection is squared, a few at a time for memory."""
    second_order = of_knockout(estimand) and "kl" in context.criteria
    linear: Criteria = tuple(c for c in context.criteria if not (second_order and c == "kl"))
    if linear:
        targets = context.targets(b)
        gradients = criterion_gradients(context.decoder, trace, linear, targets)
        yield [(c, gradient, False) for c, gradient in gradients.items()]
    if second_order:
        probes = probe_gradients(context.decoder, trace, seed)
        while some := list(islice(probes, PROBES_AT_ONCE)):
            yield [("kl", probe, True) for probe in some]


def share_blocks(context: SweepContext, steps: int) -> Iterator[Block]:
    """The share integral, one step on one batch at a time.

    Yields:
        Blocks whose results hold contributions per prompt: ``[n, layers, count]`` under
        ``criterion/kind`` for sliced kinds, ``[n, tensors]`` under ``criterion/tensor``.
    """
    for s, position in enumerate(midpoints(steps)):
        for b, batch in enumerate(context.references.batches):
            yield Block(
                key=f"share.step{s:04d}.batch{b:04d}",
                cost=(2 + 2 * len(context.criteria)) * context.weight_of(batch),
                run=lambda position=position, b=b: _share(context, position, b),  # type: ignore[misc]
                b=b,
                prompts=0,
            )


def _share(context: SweepContext, position: float, b: int) -> Result:
    resident, partition = context.resident, context.partition
    resident.move_to(position)
    batch = context.batch(b)
    per_criterion = contributions(
        context.decoder,
        batch,
        partition,
        [task_vector(resident.pair, resident)],
        context.criteria,
        context.targets(b),
    )
    return {
        f"{c}/{kind}": value
        for c, (per_tensor,) in per_criterion.items()
        for kind, value in by_kind(partition, per_tensor, batch.size).items()
    }


def task_vector(pair: Pair, resident: ResidentModel) -> TaskVector:
    """A pair's task vector, streamed in the resident model's dtype to its device."""
    return TaskVector(lambda name: pair.delta(name, resident.dtype, resident.device), pair.changed)


def by_kind(partition: Partition, per_tensor: Contributions, n: int) -> dict[Kind, torch.Tensor]:
    """Contributions summed into components.

    Args:
        partition: the components.
        per_tensor: ``[n, components of the tensor]`` by tensor name.
        n: number of prompts.

    Returns:
        float64 ``[n, layers, count]`` for sliced kinds; ``[n, tensors]`` for ``tensor``, every
        tensor with its whole sum.
    """
    dims = partition.dims
    found: dict[Kind, torch.Tensor] = {
        kind: torch.zeros((n, dims.n_layers, dims.count(kind)), dtype=torch.float64)
        for kind in SLICED_KINDS
    }
    found["tensor"] = torch.zeros((n, len(partition.tensor_names)), dtype=torch.float64)
    for i, name in enumerate(partition.tensor_names):
        if name not in per_tensor:
            continue
        layout, value = partition.layouts[name], per_tensor[name].cpu().double()
        found["tensor"][:, i] = value.sum(-1)
        if not layout.whole:
            partition.add(found, name, value)
    return found


def noise_blocks(context: SweepContext, estimand: Estimand) -> Iterator[Block]:
    """Heads swapped for themselves in the first and middle layer: what rounding alone scores."""
    batch = context.references.batches[0]
    for layer in sorted({0, context.partition.dims.n_layers // 2}):
        cost = context.copies(batch) * context.depth(layer) * context.weight_of(batch)
        yield Block(
            key=f"noise.{estimand}.layer{layer:04d}",
            cost=cost,
            run=lambda layer=layer: _noise(context, estimand, layer),  # type: ignore[misc]
        )


@torch.no_grad()
def _noise(context: SweepContext, estimand: Estimand, layer: int) -> Result:
    trace = context.packed_trace(receiver_position(estimand), 0)
    targets, criteria = context.targets(0), context.criteria
    own = own_values(context.decoder, trace, criteria, targets)
    if not context.mapped:
        same = swap_for_itself(context, receiver_position(estimand), layer)
        return {c: same[c] - own[c] for c in criteria}
    copies, dims = context.copies(trace.batch), context.partition.dims
    same = identity(context.decoder, layer, trace, dims, criteria, targets, copies)
    changes = {c: same[c] - own[c] for c in criteria}
    worst = {c: int(change.mean(-1).abs().argmax()) for c, change in changes.items()}
    return {c: change[worst[c] : worst[c] + 1] for c, change in changes.items()}
