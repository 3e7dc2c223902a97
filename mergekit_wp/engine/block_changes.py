"""What a patch does to its own block, computed exactly on the recorded input.

One attention pass with the donor's queries serves all heads of a layer, one with its keys and
values all K/V groups, one MLP pass all neurons: each component's change of the block output is
then a low-rank product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.architectures import Dims
from mergekit_wp.components import TensorLayout, layout_of
from mergekit_wp.engine.decoder import Decoder, first, hooked, returning
from mergekit_wp.engine.donor import LayerWeights
from mergekit_wp.engine.replay import Receiver
from mergekit_wp.engine.writers import Writer, read_by
from mergekit_wp.models.offloaded import here
from mergekit_wp.terms import SLICED_KINDS, FineKind


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of an output projection under the receiver's and the donor's weights.

    A component's change of the block output is ``donor_in[c] @ donor_out[:, c].T -
    receiver_in[c] @ receiver_out[:, c].T``.

    Attributes:
        receiver_in, donor_in: ``[n, T, width]``.
        receiver_out, donor_out: ``[hidden, width]``.
        count: number of components; width is a multiple of it.
    """

    receiver_in: torch.Tensor
    donor_in: torch.Tensor
    receiver_out: torch.Tensor
    donor_out: torch.Tensor
    count: int

    def changes(self, indices: Sequence[int]) -> torch.Tensor:
        """Exact change of the block output for some components, ``[C, n, T, hidden]``."""
        block = self.donor_in.shape[-1] // self.count
        changes = []
        for index in indices:
            cut = slice(index * block, (index + 1) * block)
            changes.append(
                self.donor_in[..., cut] @ self.donor_out[:, cut].T
                - self.receiver_in[..., cut] @ self.receiver_out[:, cut].T
            )
        return torch.stack(changes)

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """Dot every component's change with a gradient of the block output.

        Args:
            gradient: ``[n, T, hidden]``.

        Returns:
            ``[n, count]``, summed over positions.
        """
        products = (gradient @ self.donor_out) * self.donor_in
        products -= (gradient @ self.receiver_out) * self.receiver_in
        found: torch.Tensor = products.sum(1).unflatten(-1, (self.count, -1)).sum(-1)
        return found


@dataclass(frozen=True)
class OneByOne:
    """Changes of a block output where every component needs a pass of its own.

    Attributes:
        change: of the block output by one component, ``[n, T, hidden]``.
        count: number of components.
    """

    change: Callable[[int], torch.Tensor]
    count: int

    def changes(self, indices: Sequence[int]) -> torch.Tensor:
        """Exact change of the block output for some components, ``[C, n, T, hidden]``."""
        return torch.stack([self.change(index) for index in indices])

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """Dot every component's change with a gradient ``[n, T, hidden]``: ``[n, count]``."""
        found = [(gradient * self.change(index)).sum((1, 2)) for index in range(self.count)]
        return torch.stack(found, -1)


Changes = BlockInputs | OneByOne


def mixed(
    layout: TensorLayout,
    kind: FineKind,
    donor: torch.Tensor,
    own: torch.Tensor,
    component: int | None = None,
) -> torch.Tensor:
    """A tensor with what a kind, or one component of it, owns there from the donor.

    Args:
        layout: of the tensor.
        kind: ``head``, ``kv_group`` or ``neuron``.
        donor: the donor's tensor.
        own: the receiver's, which may be offloaded.
        component: its number within the layer; None for all of the kind.
    """
    if layout.kinds == (kind,) and component is None:
        return donor
    mask = torch.zeros(layout.count, dtype=torch.bool, device=donor.device)
    start, count = layout.start(kind), dict(layout.owners)[kind]
    if component is None:
        mask[start : start + count] = True
    else:
        mask[start + component] = True
    return torch.where(layout.expand(mask, donor.shape), donor, here(own))


def layer_layout(dims: Dims, index: int, name: str) -> TensorLayout:
    """The layout of a tensor by its name within a layer."""
    return layout_of(f"{dims.architecture.layers}.{index}.{name}", dims)


def attention_by_head(receiver: Receiver, index: int) -> torch.Tensor:
    """The receiver's own attention output, added up head by head, ``[n, T, hidden]``.

    Equal to the recorded one but for rounding: an identity patch whose effect is the noise floor.
    """
    decoder, call = receiver.decoder, receiver.recording.calls[index]
    layer, heads = decoder.layers[index], decoder.dims.n_heads
    writer = Writer.of(decoder, index, "head")
    (own,) = read_by([writer], lambda: layer(call.hidden, **call.kwargs), call.hidden)
    total, weight, bias = torch.zeros_like(call.attention), writer.weight, writer.bias
    width = own.shape[-1] // heads
    for head in range(heads):
        cut = slice(head * width, (head + 1) * width)
        total = total + own[..., cut] @ weight[:, cut].T
    return total if bias is None else total + bias


def block_inputs(
    receiver: Receiver, index: int, donor: LayerWeights, kinds: Sequence[FineKind] = SLICED_KINDS
) -> dict[FineKind, Changes]:
    """The kinds of local change in one layer.

    Args:
        receiver: the model with its recorded run.
        index: which layer.
        donor: the donor's weights that the kinds compute with, by name within the layer.
        kinds: of ``head``, ``kv_group`` and ``neuron``, those that are asked for.

    Returns:
        Changes of the block output by kind.
    """
    decoder, call = receiver.decoder, receiver.recording.calls[index]
    layer, dims, architecture = decoder.layers[index], decoder.dims, decoder.architecture
    hidden = call.hidden.detach()
    writers = {kind: Writer.of(decoder, index, kind) for kind in kinds}

    def run(swapped: LayerWeights, kind: FineKind) -> Callable[[], object]:
        """The layer with other weights; only the kind's block runs."""
        attention = returning(decoder.attention(index), call.attention, as_tuple=True)
        mlp = returning(decoder.mlp(index), call.mlp, as_tuple=False)

        def layer_with_swaps() -> None:
            with attention if kind == "neuron" else mlp:
                functional_call(layer, dict(swapped), (hidden,), call.kwargs)

        return layer_with_swaps

    read = dict(call.read)  # by the receiver's own weights, in a block

    def plain(kind: FineKind) -> BlockInputs:
        writer = writers[kind]
        if writer.name not in read:
            (read[writer.name],) = read_by([writer], run({}, kind), hidden)
        own, ours = read[writer.name], writer.weight
        # K/V groups own no columns; the heads of a group are neighbours there, so it is a block
        theirs = writer.columns(donor[writer.name]) if kind != "kv_group" else ours
        swapped = {
            name: mixed(
                layer_layout(dims, index, name), kind, donor[name], layer.get_parameter(name)
            )
            for name in architecture.read_by(kind, donor)
        }
        (their,) = read_by([writer], run(swapped, kind), hidden)
        return BlockInputs(own, their, ours, theirs, dims.count(kind))

    def coupled(kind: FineKind) -> OneByOne:
        names = [*architecture.read_by(kind, donor)]
        names += [architecture.out(kind)] if kind != "kv_group" else []
        ours = {name: here(layer.get_parameter(name)) for name in names}

        def change(component: int) -> torch.Tensor:
            swapped = {
                name: mixed(layer_layout(dims, index, name), kind, donor[name], own, component)
                for name, own in ours.items()
            }
            return attention_of(decoder, index, run(swapped, kind)) - call.attention.detach()

        return OneByOne(change, dims.count(kind))

    return {kind: coupled(kind) if kind in architecture.coupled else plain(kind) for kind in kinds}


def attention_of(decoder: Decoder, index: int, run: Callable[[], object]) -> torch.Tensor:
    """What the attention block of a layer returns while `run` runs."""
    found: dict[nn.Module, Any] = {}
    block = decoder.attention(index)
    with outputs_of([block], found):
        run()
    return first(found[block]).detach()


@contextmanager
def outputs_of(modules: Sequence[nn.Module], found: dict[nn.Module, Any]) -> Iterator[None]:
    """Collect what modules return while the context lasts."""

    def keep(module: nn.Module, _args: object, output: Any) -> None:
        found[module] = output

    with hooked([module.register_forward_hook(keep) for module in modules]):
        yield
