"""Real swaps of components, layer by layer; and what swapping for itself scores by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mergekit_wp.engine.activation_swaps import put_layer, put_modules, put_outside_layers
from mergekit_wp.engine.block_changes import LayerWeights
from mergekit_wp.engine.replay import Trace
from mergekit_wp.engine.unmapped import swap_weights
from mergekit_wp.engine.weight_swaps import (
    Values,
    identity,
    joined,
    swap_layer_weights,
    swap_outside_layers,
    swap_slices,
)
from mergekit_wp.runs.recordings import Block, Result, SweepContext, receiver_position
from mergekit_wp.terms import SLICED_KINDS, Estimand, Kind, of_activations


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


#: indices of a block's components, by kind
Chosen = dict[Kind, list[int]]
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
    own = context.own(trace, b)
    found: dict[Kind, Values] = {}
    if sliced := [kind for kind in SLICED_KINDS if kind in chosen]:
        inputs = context.inputs(estimand, layer, trace, sliced)
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
    swaps: list[LayerWeights] = [state] if "layer" in chosen else []
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
    own = context.own(trace, 0)
    if not context.mapped:
        same = swap_for_itself(context, receiver_position(estimand), layer)
        return {c: same[c] - own[c] for c in criteria}
    copies, dims = context.copies(trace.batch), context.partition.dims
    same = identity(context.decoder, layer, trace, dims, criteria, targets, copies)
    changes = {c: same[c] - own[c] for c in criteria}
    worst = {c: int(change.mean(-1).abs().argmax()) for c, change in changes.items()}
    return {c: change[worst[c] : worst[c] + 1] for c, change in changes.items()}


def swap_whole(
    context: SweepContext, position: float, b: int, trace: Trace, layer: int, chosen: Chosen
) -> dict[Kind, Values]:
    """Weights of a layer and of whole tensors."""
    partition, targets = context.partition, context.targets(b)
    sets: dict[Kind, list[list[str]]] = {}
    if "layer" in chosen:
        sets["layer"] = [list(partition.layer_tensors(layer))]
    if "tensor" in chosen:
        sets["tensor"] = [[partition.tensor_names[i]] for i in chosen["tensor"]]
    return {
        kind: swap_weights(
            context.decoder,
            trace.batch,
            (context.donor(position, names) for names in every),
            context.criteria,
            targets,
        )
        for kind, every in sets.items()
    }


def swap_for_itself(context: SweepContext, position: float, layer: int) -> Values:
    """A layer swapped for itself: what the same run, made twice, differs by."""
    names = list(context.partition.layer_tensors(layer))
    own = context.donor(1.0 - position, names)
    return swap_weights(
        context.decoder, context.batch(0), [own], context.criteria, context.targets(0)
    )
