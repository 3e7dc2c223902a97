"""Compute a block: real swaps, first-order passes, and gradients along the path to the expert.

Results are changes per prompt, so that standard errors can be taken at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from mergekit_wp.components import Partition
from mergekit_wp.criteria import Criteria
from mergekit_wp.engine.activation_swaps import put_layer, put_modules, put_outside_layers
from mergekit_wp.engine.donor import Donor
from mergekit_wp.engine.gradients import (
    PROBES_AT_ONCE,
    BlockGradients,
    criterion_gradients,
    probe_gradients,
    project,
    record_with_gradients,
)
from mergekit_wp.engine.integrated_gradients import (
    TaskVector,
    TensorContributions,
    contributions,
)
from mergekit_wp.engine.replay import Receiver, Values
from mergekit_wp.engine.weight_swaps import (
    identity,
    joined,
    swap_layer_weights,
    swap_outside_layers,
    swap_slices,
    swap_whole,
)
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.cluster import Assignment, SentModels, moved
from mergekit_wp.runs.recordings import (
    Portion,
    Recordings,
    Result,
    in_portions,
    receiver_position,
)
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.blocks import Block, flat
from mergekit_wp.terms import (
    SLICED_KINDS,
    CriterionName,
    Kind,
    of_activations,
)

#: how names of results end that hold a first-order pass's second order
CURVATURE = "/curvature"


def measure(block: Block, recordings: Recordings, at_once: AtOnce) -> Result:
    """A block's result, with fewer patches or prompts at once wherever memory runs out.

    Returns:
        Under ``criterion/kind``: changes ``[C, n]`` of patches, ``[layers, n, count]`` of a
        first-order pass, and under `CURVATURE` behind it its second order, which is in them;
        contributions ``[n, layers, count]`` or ``[n, tensors]`` of a step of the
        share integral. Of the noise floor ``[1, n]`` under ``criterion``.

    Raises:
        OutOfMemory: there is not even memory for one sequence.
    """
    compute = {
        "share": _step,
        "first-order": _first_order,
        "exact": _patch,
        "verify": _patch,
        "noise": _noise,
    }[block.sweep]

    def work(portion: Portion) -> Result:
        return compute(block, recordings, portion)

    return in_portions(recordings, at_once, block.batch, work, block.prompts)


@dataclass(frozen=True)
class Blocks(Assignment):
    """Blocks of the sweeps of one expert."""

    models: SentModels
    references: References
    criteria: Criteria
    batch_size: int

    def begin(self, told: Callable[[str], None]) -> Callable[[Block], Result]:
        """Open the models; see `measure`."""
        [pair] = self.models.opened()
        references = moved(self.references, self.models.device)
        recordings = Recordings(self.models.loaded(pair), references, self.criteria)
        at_once = AtOnce(self.batch_size, told, recordings.forget)
        return partial(measure, recordings=recordings, at_once=at_once)


# --- exact swaps ------------------------------------------------------------------------------


@torch.no_grad()
def _patch(block: Block, recordings: Recordings, portion: Portion) -> Result:
    """Heads, K/V groups and neurons alike for weights and activations; the rest by either."""
    position, estimand, layer = receiver_position(block.estimand), block.estimand, block.layer
    assert layer is not None
    receiver, chosen = recordings.receiver(position, portion), dict(block.chosen)
    found: dict[Kind, Values] = {}
    if sliced := [kind for kind in SLICED_KINDS if kind in chosen]:
        inputs = recordings.changes(estimand, layer, receiver, sliced)
        for kind in sliced:
            found[kind] = swap_slices(receiver, layer, kind, inputs[kind], chosen[kind])
    sets: dict[Kind, list[tuple[str, ...]]] = {}  # of tensors that are exchanged together
    if "layer" in chosen:
        sets["layer"] = [recordings.partition.layer_tensors(layer)]
    if "tensor" in chosen:
        sets["tensor"] = [(recordings.partition.tensor_names[i],) for i in chosen["tensor"]]
    if sets:
        patch = _put if of_activations(estimand) else _swap if recordings.mapped else _run_anew
        found |= patch(receiver, recordings.donor(position), layer, sets)
    own = receiver.own
    return {f"{c}/{kind}": v[c] - own[c] for kind, v in found.items() for c in receiver.criteria}


def _swap(
    receiver: Receiver, donor: Donor, layer: int, sets: Mapping[Kind, Sequence[tuple[str, ...]]]
) -> dict[Kind, Values]:
    """Weights of a whole layer, and of tensors."""
    every = [names for of_kind in sets.values() for names in of_kind]
    if layer == receiver.decoder.dims.n_layers:
        weights = donor.tensors([name for (name,) in every])
        parts = [swap_outside_layers(receiver, name, weight) for name, weight in weights.items()]
        return {"tensor": joined(parts, receiver.criteria)}
    state = donor.layer(layer)
    swaps = [{name: state[name] for name in _within(receiver, names)} for names in every]
    values = swap_layer_weights(receiver, layer, swaps)
    counts = [len(of_kind) for of_kind in sets.values()]
    pieces = {c: value.split(counts) for c, value in values.items()}
    return {kind: {c: piece[i] for c, piece in pieces.items()} for i, kind in enumerate(sets)}


def _put(
    receiver: Receiver, donor: Donor, layer: int, sets: Mapping[Kind, Sequence[tuple[str, ...]]]
) -> dict[Kind, Values]:
    """Activations of a layer, and of the modules that tensors belong to."""
    names = [name for (name,) in sets.get("tensor", ())]
    if layer == receiver.decoder.dims.n_layers:
        parts = [put_outside_layers(receiver, donor, name) for name in names]
        return {"tensor": joined(parts, receiver.criteria)}
    found: dict[Kind, Values] = {}
    if "layer" in sets:
        found["layer"] = put_layer(receiver, layer, donor)
    if names:
        found["tensor"] = put_modules(receiver, layer, donor, _within(receiver, names))
    return found


def _run_anew(
    receiver: Receiver, donor: Donor, layer: int, sets: Mapping[Kind, Sequence[tuple[str, ...]]]
) -> dict[Kind, Values]:
    """Weights of a layer and of tensors, where there is no map to replay by."""
    return {kind: swap_whole(receiver, map(donor.tensors, some)) for kind, some in sets.items()}


def _within(receiver: Receiver, names: Sequence[str]) -> list[str]:
    """Tensors of one layer by their names within it."""
    places = [receiver.decoder.architecture.within_layer(name) for name in names]
    return [place[1] for place in places if place is not None]


@torch.no_grad()
def _noise(block: Block, recordings: Recordings, portion: Portion) -> Result:
    """What a layer's heads, or the layer where there is no map, score when swapped for itself."""
    position, layer = receiver_position(block.estimand), block.layer
    assert layer is not None
    receiver = recordings.receiver(position, portion)
    if recordings.mapped:
        same = identity(receiver, layer)
    else:
        names = list(recordings.partition.layer_tensors(layer))
        same = swap_whole(receiver, [recordings.donor(1.0 - position).tensors(names)])
    changes = {c: same[c] - receiver.own[c] for c in receiver.criteria}
    worst = {c: int(change.mean(-1).abs().argmax()) for c, change in changes.items()}
    return {c: change[worst[c] : worst[c] + 1] for c, change in changes.items()}


# --- first order ------------------------------------------------------------------------------


def _first_order(block: Block, recordings: Recordings, portion: Portion) -> Result:
    """The component's own change exactly, all downstream of it to first or second order."""
    estimand, dims = block.estimand, recordings.partition.dims
    kinds = [kind for kind in SLICED_KINDS if kind in dict(block.chosen)]
    recordings.resident.move_to(receiver_position(estimand))
    (batch, targets), decoder = recordings.prompts(portion), recordings.decoder
    recording = record_with_gradients(decoder, batch, kinds)
    receiver = Receiver(decoder, recording, recordings.criteria, targets)
    found: Result = {
        f"{c}/{kind}{end}": torch.zeros((dims.n_layers, batch.size, dims.count(kind))).double()
        for kind in kinds
        for c in recordings.criteria
        for end in ("", CURVATURE)
        if not end or c in block.curved
    }
    for terms in _gradient_terms(block, receiver):
        with torch.no_grad():
            for layer in range(dims.n_layers):
                changed = [k for k in kinds if recordings.differs(estimand, k, layer)]
                if not changed:
                    continue
                inputs = recordings.changes(estimand, layer, receiver, changed)
                wanted = {kind: inputs[kind] for kind in changed}
                for criterion, gradients, squared in terms:
                    for kind, change in project(gradients, wanted, layer, batch.size).items():
                        change = change.cpu().double()
                        if squared:  # half the variance is half the probes' mean square
                            change = -change.square() / (2 * block.probes)
                            found[f"{criterion}/{kind}{CURVATURE}"][layer] += change
                        found[f"{criterion}/{kind}"][layer] += change
                del inputs, wanted  # the donor's weights of one layer at a time
    return found


def _gradient_terms(
    block: Block, receiver: Receiver
) -> Iterator[list[tuple[CriterionName, BlockGradients, bool]]]:
    """Criterion, gradients and whether the projection is squared, a few at a time for memory."""
    linear: Criteria = tuple(c for c in receiver.criteria if not flat(block.estimand, c))
    if linear:
        gradients = criterion_gradients(replace(receiver, criteria=linear))
        yield [(c, gradient, False) for c, gradient in gradients.items()]
    if block.curved:
        probes = probe_gradients(receiver, block.seed, block.probes)
        while some := list(islice(probes, PROBES_AT_ONCE)):
            yield [(c, probe, True) for c in block.curved for probe in some]


# --- shares -----------------------------------------------------------------------------------


def _step(block: Block, recordings: Recordings, portion: Portion) -> Result:
    """Gradients times the task vector at one midpoint between base and expert."""
    assert block.step is not None
    step, steps = block.step
    resident, partition = recordings.resident, recordings.partition
    resident.move_to((step + 0.5) / steps)
    batch, targets = recordings.prompts(portion)
    per_criterion = contributions(
        recordings.decoder,
        batch,
        partition,
        [TaskVector.of(resident.pair, resident.dtype, resident.device)],
        recordings.criteria,
        targets,
    )
    return {
        f"{c}/{kind}": value
        for c, (per_tensor,) in per_criterion.items()
        for kind, value in _by_kind(partition, per_tensor, batch.size).items()
    }


def _by_kind(
    partition: Partition, per_tensor: TensorContributions, n: int
) -> dict[Kind, torch.Tensor]:
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
