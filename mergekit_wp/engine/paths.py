"""Path patches: a supplier's change goes into one target's input, everything else is held.

The supplier's change (of its weights, or of what it writes) is added to the input of the target's
block as it reaches the residual stream, through whatever norm or factor its layer puts there; what
the target then writes more or less goes on into the rest of the model. So the value read at the end
came along the one edge (path patching, Goldowsky-Dill et al., arXiv 2304.05969; with weights as the
source: "Weight Patching", arXiv 2604.13694).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from mergekit_wp.engine.decoder import Decoder, first, returning
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
        """Whether it lies in the MLP block."""
        return self.kind == "neuron"

    def reads(self, other: Place, *, parallel: bool) -> bool:
        """Whether the residual stream carries what `other` writes to this component's block.

        Args:
            other: a component.
            parallel: whether MLPs read what enters their layer, not the attention block there.
        """
        if self.layer == other.layer:
            return self.in_mlp and not other.in_mlp and not parallel
        return other.layer < self.layer


def _added(receiver: Receiver, layer: int, in_mlp: bool, written: torch.Tensor) -> torch.Tensor:
    """What a layer adds to the residual stream, ``[C, n, T, hidden]``, by one of its blocks.

    The layer itself runs, on nothing: a norm or factor after its blocks is its own.
    """
    decoder, copies, flat = receiver.decoder, len(written), written.flatten(0, 1)
    nothing = torch.zeros_like(flat)
    kwargs = repeated_kwargs(receiver.recording.calls[layer], receiver.batch.n_rows, copies)
    attention = returning(decoder.attention(layer), nothing if in_mlp else flat, as_tuple=True)
    with attention, returning(decoder.mlp(layer), flat if in_mlp else nothing, as_tuple=False):
        added = first(decoder.layers[layer](nothing, **kwargs))
    return added.view_as(written)


def _returned(receiver: Receiver, layer: int, in_mlp: bool) -> torch.Tensor:
    """What a block returns in the recorded run, ``[1, n, T, hidden]``."""
    call = receiver.recording.calls[layer]
    return (call.mlp if in_mlp else call.attention).detach().unsqueeze(0)


def reaching(receiver: Receiver, source: Place, changes: torch.Tensor) -> torch.Tensor:
    """Changes of the residual stream by changes of what a component's block returns.

    Args:
        receiver: the model with its recorded run.
        source: the component.
        changes: of its block's output, ``[C, n, T, hidden]``.

    Returns:
        ``[C, n, T, hidden]``.
    """
    own = _returned(receiver, source.layer, source.in_mlp)
    moved = _added(receiver, source.layer, source.in_mlp, own + changes)
    return moved - _added(receiver, source.layer, source.in_mlp, own)


def at_block(receiver: Receiver, layer: int, in_mlp: bool, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient by what a block returns, of one ``[n, T, hidden]`` by the residual stream."""
    own = _returned(receiver, layer, in_mlp).requires_grad_()
    with torch.enable_grad():
        along = (_added(receiver, layer, in_mlp, own)[0] * gradient).sum()
        return torch.autograd.grad(along, own)[0][0]


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
    """Gradient of the value along the target alone, with respect to what enters its layer.

    Dotted with a supplier's change of the residual stream, it is the first-order supply.

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
    """Values ``[C, n]`` when changes of a block's output reach no later block, only the end.

    The end of the residual stream is where the criterion is read: the final norm, or the anchor's
    layer.
    """
    found: Values = {}
    for criterion in receiver.criteria:
        alone = replace(receiver, criteria=(criterion,))
        last = max(last_layer(receiver.decoder, (criterion,), receiver.targets), place.layer)
        hidden = receiver.recording.residual(last) + reaching(receiver, place, changes)
        found |= alone.replay(hidden, last)
    return found
