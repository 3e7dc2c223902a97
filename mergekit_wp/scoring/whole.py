"""Patches of models without a component map: layers and tensors, see `engine.whole`."""

from __future__ import annotations

from mergekit_wp.components import Kind
from mergekit_wp.engine.patches import Values
from mergekit_wp.engine.trace import Trace
from mergekit_wp.engine.whole import swap_weights
from mergekit_wp.scoring.sweep import SweepContext

#: indices of a block's components, by kind
Chosen = dict[Kind, list[int]]


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
