"""Path patches: a supplier's change goes into one target's input, everything else is held.

The supplier's change of the residual stream (of its weights, or of what it writes) is added to
the input of the target's block; what the target then writes more or less goes on into the rest of
the model. So the value read at the end came along the one edge (path patching, Goldowsky-Dill et
al., arXiv 2304.05969; with weights as the source: "Weight Patching", arXiv 2604.13694).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from mergekit_wp.architectures import Dims
from mergekit_wp.criteria import Criteria, Targets
from mergekit_wp.engine.decoder import Decoder, hooked, returning
from mergekit_wp.engine.gradients import BlockGradients
from mergekit_wp.engine.replay import Trace, last_layer, layer_output, repeated_kwargs, replay
from mergekit_wp.engine.weight_swaps import Values
from mergekit_wp.engine.writers import Writer
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
    decoder: Decoder, target: Place, trace: Trace, hidden: torch.Tensor, copies: int
) -> torch.Tensor:
    """What the output projection of the target's block reads, given the layer's input.

    A neuron's block reads the attention block's output as recorded: that is held.
    """
    layer, call = decoder.layers[target.layer], trace.calls[target.layer]
    writer = Writer.of(decoder, target.layer, target.kind)
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        keep = writer.module.register_forward_pre_hook(
            lambda _module, args: seen.append(writer.read(args).view(*hidden.shape[:2], -1))
        )
        stack.enter_context(hooked([keep]))
        if target.in_mlp:
            held = call.attention.detach().repeat(copies, 1, 1)
            stack.enter_context(returning(decoder.attention(target.layer), held, as_tuple=True))
        layer(hidden, **repeated_kwargs(call, trace.batch.n_rows, copies))
    return seen[0]


def _written(decoder: Decoder, target: Place, read: torch.Tensor, dims: Dims) -> torch.Tensor:
    """What a head or neuron writes, given what its block's output projection reads."""
    weight = Writer.of(decoder, target.layer, target.kind).weight
    width = weight.shape[1] // dims.count(target.kind)
    cut = slice(target.index * width, (target.index + 1) * width)
    written: torch.Tensor = read[..., cut] @ weight[:, cut].T
    return written


def supply_gradient(
    decoder: Decoder, target: Place, trace: Trace, gradients: BlockGradients, dims: Dims
) -> torch.Tensor | None:
    """Gradient of the value along the target alone, with respect to its block's input.

    Dotted with a supplier's change, it is the first-order supply.

    Args:
        decoder: the receiving model.
        target: a head or a neuron.
        trace: the receiver's recorded run.
        gradients: of the value with respect to every block's output.
        dims: component counts.

    Returns:
        ``[n, T, hidden]``; None where the value does not depend on the target.
    """
    gradient = gradients.of(target.kind, target.layer)
    if gradient is None:
        return None
    with torch.enable_grad():
        hidden = trace.calls[target.layer].hidden.detach().requires_grad_()
        read = _block_input(decoder, target, trace, hidden, 1)
        along = (gradient.detach() * _written(decoder, target, read, dims)).sum()
        (found,) = torch.autograd.grad(along, hidden)
    return found


def supplied(
    decoder: Decoder,
    target: Place,
    trace: Trace,
    changes: torch.Tensor,
    dims: Dims,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Exact values when suppliers' changes reach the target's input and nothing else.

    Args:
        decoder: the receiving model.
        target: a head or a neuron.
        trace: the receiver's recorded run.
        changes: of the residual stream, ``[C, n, T, hidden]``; one patch each.
        dims: component counts.
        criteria: which criteria to read.
        targets: what they are measured against.

    Returns:
        Values ``[C, n]`` per criterion.
    """
    copies, call = len(changes), trace.calls[target.layer]
    own = _block_input(decoder, target, trace, call.hidden, 1)
    moved = (call.hidden + changes).flatten(0, 1)
    read = _block_input(decoder, target, trace, moved, copies).unflatten(0, (copies, -1))
    change = _written(decoder, target, read, dims) - _written(decoder, target, own, dims)
    return written_anew(decoder, target, trace, change, criteria, targets)


def written_anew(
    decoder: Decoder,
    place: Place,
    trace: Trace,
    changes: torch.Tensor,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Values ``[C, n]`` when a component's block writes changes ``[C, n, T, hidden]`` besides."""
    call = trace.calls[place.layer]
    if place.in_mlp:
        own = call.attention.expand_as(changes)
        output = layer_output(decoder, place.layer, trace, attention=own, mlp=call.mlp + changes)
    else:
        output = layer_output(decoder, place.layer, trace, attention=call.attention + changes)
    return replay(decoder, trace, output, place.layer, criteria, targets)


def written_to_the_end(
    decoder: Decoder,
    place: Place,
    trace: Trace,
    changes: torch.Tensor,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Values ``[C, n]`` when changes reach the end of the residual stream and no later block.

    The end is where the criterion is read: the final norm, or the anchor's layer.
    """
    parts = []
    for criterion in criteria:
        last = max(last_layer(decoder, (criterion,), targets), place.layer)
        hidden = trace.residual(last) + changes
        parts.append(replay(decoder, trace, hidden, last, (criterion,), targets))
    return {c: part[c] for c, part in zip(criteria, parts, strict=True)}
