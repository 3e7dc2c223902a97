"""Path patches: a supplier's change goes into one target's input, everything else is held.

The supplier's change of the residual stream (of its weights, or of what it writes) is added to
the input of the target's block; what the target then writes more or less goes on into the rest of
the model. So the value read at the end came along the one edge (path patching, Goldowsky-Dill et
al., arXiv 2304.05969; with weights as the source: "Weight Patching", arXiv 2604.13694).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from mergekit_wp.engine.decoder import Decoder, returning
from mergekit_wp.engine.gradients import BlockGradients
from mergekit_wp.engine.replay import Receiver, Values, last_layer, repeated_kwargs
from mergekit_wp.engine.weight_swaps import written_anew
from mergekit_wp.engine.writers import Writer, read_by
from mergekit_wp.terms import FineKind


@dataclass(frozen=True, order=True)
class Place:
    """One head, K/V group or neuron."""

    layer: int
    kind: FineKind
    index: int

    @property
    def name(self) -> str:
        """As everywhere: ``layer 3 head 1``."""
        return f"layer {self.layer} {self.kind} {self.index}"

    @property
    def in_mlp(self) -> bool:
        """Whether it lies in the MLP block, which reads the attention block of its layer."""
        return self.kind == "neuron"

    def reads(self, other: Place) -> bool:
        """Whether the residual stream carries what `other` writes to this component's block."""
        if self.layer == other.layer:
            return self.in_mlp and not other.in_mlp
        return other.layer < self.layer


def _block_input(
    receiver: Receiver, target: Place, hidden: torch.Tensor, copies: int
) -> torch.Tensor:
    """What the output projection of the target's block reads, given the layer's input.

    A neuron's block reads the attention block's output as recorded: that is held.
    """
    decoder, call = receiver.decoder, receiver.recording.calls[target.layer]
    layer, writer = decoder.layers[target.layer], Writer.of(decoder, target.layer, target.kind)
    held = call.attention.detach().repeat(copies, 1, 1)
    attention = returning(decoder.attention(target.layer), held, as_tuple=True)
    kwargs = repeated_kwargs(call, receiver.batch.n_rows, copies)
    with attention if target.in_mlp else nullcontext():
        (read,) = read_by([writer], lambda: layer(hidden, **kwargs), hidden)
    return read


def _written(decoder: Decoder, target: Place, read: torch.Tensor) -> torch.Tensor:
    """What a head or neuron writes, given what its block's output projection reads."""
    weight = Writer.of(decoder, target.layer, target.kind).weight
    width = weight.shape[1] // decoder.dims.count(target.kind)
    cut = slice(target.index * width, (target.index + 1) * width)
    written: torch.Tensor = read[..., cut] @ weight[:, cut].T
    return written


def supply_gradient(
    receiver: Receiver, target: Place, gradients: BlockGradients
) -> torch.Tensor | None:
    """Gradient of the value along the target alone, with respect to its block's input.

    Dotted with a supplier's change, it is the first-order supply.

    Args:
        receiver: the model with its recorded run.
        target: a head or a neuron.
        gradients: of the value with respect to every block's output.

    Returns:
        ``[n, T, hidden]``; None where the value does not depend on the target.
    """
    gradient = gradients.of(target.kind, target.layer)
    if gradient is None:
        return None
    with torch.enable_grad():
        hidden = receiver.recording.calls[target.layer].hidden.detach().requires_grad_()
        read = _block_input(receiver, target, hidden, 1)
        along = (gradient.detach() * _written(receiver.decoder, target, read)).sum()
        (found,) = torch.autograd.grad(along, hidden)
    return found


def supplied(receiver: Receiver, target: Place, changes: torch.Tensor) -> Values:
    """Exact values when suppliers' changes reach the target's input and nothing else.

    Args:
        receiver: the model with its recorded run.
        target: a head or a neuron.
        changes: of the residual stream, ``[C, n, T, hidden]``; one patch each.

    Returns:
        Values ``[C, n]`` per criterion.
    """
    copies, call = len(changes), receiver.recording.calls[target.layer]
    own = _block_input(receiver, target, call.hidden, 1)
    moved = (call.hidden + changes).flatten(0, 1)
    read = _block_input(receiver, target, moved, copies).unflatten(0, (copies, -1))
    decoder = receiver.decoder
    change = _written(decoder, target, read) - _written(decoder, target, own)
    return written_anew(receiver, target.layer, target.kind, change)


def written_to_the_end(receiver: Receiver, place: Place, changes: torch.Tensor) -> Values:
    """Values ``[C, n]`` when changes reach the end of the residual stream and no later block.

    The end is where the criterion is read: the final norm, or the anchor's layer.
    """
    found: Values = {}
    for criterion in receiver.criteria:
        alone = replace(receiver, criteria=(criterion,))
        last = max(last_layer(receiver.decoder, (criterion,), receiver.targets), place.layer)
        hidden = receiver.recording.residual(last) + changes
        found |= alone.replay(hidden, last)
    return found
