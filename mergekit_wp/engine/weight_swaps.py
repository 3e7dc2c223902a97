"""Exact swaps of weights: values of a model in which single components come from the donor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from mergekit_wp.criteria import Criteria
from mergekit_wp.engine.block_changes import Changes, attention_by_head
from mergekit_wp.engine.donor import LayerWeights
from mergekit_wp.engine.replay import Receiver, Values, record_whole
from mergekit_wp.terms import FineKind

T = TypeVar("T")


def joined(parts: list[Values], criteria: Criteria) -> Values:
    """Values of several replays, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in criteria}


def replayed(
    receiver: Receiver,
    index: int,
    patches: Sequence[T],
    output: Callable[[Sequence[T]], torch.Tensor],
) -> Values:
    """Values ``[len(patches), n]`` per criterion, as many patches at once as the receiver takes.

    Args:
        receiver: the model with its recorded run.
        index: the layer that is patched.
        patches: one at a time.
        output: of the layer under some of them, ``[C, rows, T, hidden]``.
    """
    starts = range(0, len(patches), receiver.copies)
    some = (patches[start : start + receiver.copies] for start in starts)
    return joined([receiver.replay(output(patch), index) for patch in some], receiver.criteria)


def swap_slices(
    receiver: Receiver, index: int, kind: FineKind, inputs: Changes, indices: Sequence[int]
) -> Values:
    """Swap heads, K/V groups or neurons of one layer, one at a time.

    Args:
        receiver: the model with its recorded run.
        index: the layer.
        kind: ``head``, ``kv_group`` or ``neuron``.
        inputs: the kind's changes in this layer.
        indices: which components.

    Returns:
        Values ``[len(indices), n]`` per criterion.
    """
    return replayed(
        receiver, index, indices, lambda some: _written(receiver, index, kind, inputs.changes(some))
    )


def written_anew(receiver: Receiver, index: int, kind: FineKind, changes: torch.Tensor) -> Values:
    """Values ``[C, n]`` when a kind's block writes changes ``[C, n, T, hidden]`` besides."""
    return receiver.replay(_written(receiver, index, kind, changes), index)


def _written(receiver: Receiver, index: int, kind: FineKind, changes: torch.Tensor) -> torch.Tensor:
    call = receiver.recording.calls[index]
    if kind == "neuron":
        own = call.attention.expand_as(changes)
        return receiver.layer_output(index, attention=own, mlp=call.mlp + changes)
    return receiver.layer_output(index, attention=call.attention + changes)


def swap_layer_weights(receiver: Receiver, index: int, swaps: Sequence[LayerWeights]) -> Values:
    """Swap whole tensors of one layer: each of `swaps` is one patch, by name within the layer.

    Returns:
        Values ``[len(swaps), n]`` per criterion.
    """

    def output(some: Sequence[LayerWeights]) -> torch.Tensor:
        return torch.cat([receiver.layer_output(index, swapped=swap) for swap in some])

    return replayed(receiver, index, swaps, output)


def swap_outside_layers(receiver: Receiver, name: str, weight: torch.Tensor) -> Values:
    """Swap an embedding, a tensor of the final norm, or the unembedding.

    Returns:
        Values ``[1, n]`` per criterion.
    """
    decoder = receiver.decoder
    if decoder.architecture.enters(name):
        hidden = decoder.entering(receiver.batch, {name: weight}).unsqueeze(0)
        return receiver.replay(hidden, -1, {name: weight})
    last = len(decoder.layers) - 1
    hidden = receiver.recording.residual(last).unsqueeze(0)
    return receiver.replay(hidden, last, {name: weight})


def swap_whole(receiver: Receiver, swaps: Iterable[LayerWeights]) -> Values:
    """Run a model without a map anew, some of its weights exchanged: each of `swaps` is one patch.

    Args:
        receiver: the model with its recorded run.
        swaps: the donor's tensors by name; one of them is held at a time.

    Returns:
        Values ``[swaps, n]`` per criterion.
    """
    decoder, criteria = receiver.decoder, receiver.criteria
    runs = [
        Receiver(decoder, record_whole(decoder, receiver.batch, s), criteria, receiver.targets).own
        for s in swaps
    ]
    return {c: torch.stack([run[c] for run in runs]) for c in criteria}


def identity(receiver: Receiver, index: int) -> Values:
    """Swap every head of a layer for itself: what rounding alone does to the values.

    Returns:
        Values ``[copies, n]`` per criterion.
    """
    attention = attention_by_head(receiver, index).expand(receiver.copies, -1, -1, -1)
    return receiver.replay(receiver.layer_output(index, attention=attention), index)
