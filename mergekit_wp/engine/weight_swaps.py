"""Exact swaps: values of a model in which single components come from the donor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_wp.architectures import Dims
from mergekit_wp.criteria import Criteria, Targets
from mergekit_wp.engine.block_changes import Changes, LayerWeights, attention_by_head
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import Trace, layer_output, replay
from mergekit_wp.terms import CriterionName, FineKind

Values = dict[CriterionName, torch.Tensor]


def joined(parts: list[Values], criteria: Criteria) -> Values:
    """Values of several replays, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in criteria}


def swap_slices(
    decoder: Decoder,
    index: int,
    trace: Trace,
    kind: FineKind,
    inputs: Changes,
    indices: Sequence[int],
    criteria: Criteria,
    targets: Targets,
    copies: int,
) -> Values:
    """Swap heads, K/V groups or neurons of one layer, one at a time.

    Args:
        decoder: the receiving model.
        index: the layer.
        trace: the receiver's recorded run.
        kind: ``head``, ``kv_group`` or ``neuron``.
        inputs: the kind's changes in this layer.
        indices: which components.
        criteria: which criteria to read.
        targets: what they are measured against.
        copies: patches per replay.

    Returns:
        Values ``[len(indices), n]`` per criterion.
    """
    call = trace.calls[index]
    parts = []
    for start in range(0, len(indices), copies):
        changes = inputs.changes(indices[start : start + copies])
        if kind == "neuron":
            own = call.attention.expand_as(changes)
            output = layer_output(decoder, index, trace, attention=own, mlp=call.mlp + changes)
        else:
            output = layer_output(decoder, index, trace, attention=call.attention + changes)
        parts.append(replay(decoder, trace, output, index, criteria, targets))
    return joined(parts, criteria)


def swap_layer_weights(
    decoder: Decoder,
    index: int,
    trace: Trace,
    swaps: Sequence[LayerWeights],
    criteria: Criteria,
    targets: Targets,
    copies: int,
) -> Values:
    """Swap whole tensors of one layer: each of `swaps` is one patch, by name within the layer.

    Returns:
        Values ``[len(swaps), n]`` per criterion.
    """
    parts = []
    for start in range(0, len(swaps), copies):
        outputs = [
            layer_output(decoder, index, trace, swapped=swap)
            for swap in swaps[start : start + copies]
        ]
        parts.append(replay(decoder, trace, torch.cat(outputs), index, criteria, targets))
    return joined(parts, criteria)


def swap_outside_layers(
    decoder: Decoder,
    trace: Trace,
    name: str,
    weight: torch.Tensor,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Swap an embedding, a tensor of the final norm, or the unembedding.

    Returns:
        Values ``[1, n]`` per criterion.
    """
    if decoder.architecture.enters(name):
        hidden = decoder.entering(trace.batch, {name: weight}).unsqueeze(0)
        return replay(decoder, trace, hidden, -1, criteria, targets, {name: weight})
    last = len(decoder.layers) - 1
    hidden = trace.residual(last).unsqueeze(0)
    return replay(decoder, trace, hidden, last, criteria, targets, {name: weight})


def identity(
    decoder: Decoder,
    index: int,
    trace: Trace,
    dims: Dims,
    criteria: Criteria,
    targets: Targets,
    copies: int,
) -> Values:
    """Swap every head of a layer for itself: what rounding alone does to the values.

    Returns:
        Values ``[copies, n]`` per criterion.
    """
    attention = attention_by_head(decoder, index, trace, dims).expand(copies, -1, -1, -1)
    output = layer_output(decoder, index, trace, attention=attention)
    return replay(decoder, trace, output, index, criteria, targets)
