"""What a patch does to its own block, computed exactly on the recorded input.

One attention pass with the donor's queries serves all heads of a layer, one with its keys and
values all K/V groups, one MLP pass all neurons: each component's change of the block output is
then a low-rank product (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.components import Dims, FineKind
from mergekit_wp.engine.trace import Decoder, Trace, hooked

_QUERY = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")
_KEY_VALUE = (
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
)
_GATE_UP = (
    "mlp.gate_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.weight",
    "mlp.up_proj.bias",
)
_OUT = "self_attn.o_proj.weight"
_DOWN = "mlp.down_proj.weight"

State = Mapping[str, torch.Tensor]


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


def inputs_of(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[torch.Tensor]:
    """What modules are called with while `run` runs."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = args[0].detach()

    with hooked([module.register_forward_pre_hook(keep) for module in modules]):
        run()
    return [seen[module] for module in modules]


def attention_by_head(decoder: Decoder, index: int, trace: Trace, dims: Dims) -> torch.Tensor:
    """The receiver's own attention output, added up head by head, ``[n, T, hidden]``.

    Equal to the recorded one but for rounding: an identity patch whose effect is the noise floor.
    """
    layer, call = decoder.layers[index], trace.calls[index]
    out_proj = layer.self_attn.o_proj
    (own,) = inputs_of([out_proj], lambda: layer(call.hidden, **call.kwargs))
    total = torch.zeros_like(call.attention)
    width = own.shape[-1] // dims.n_heads
    for head in range(dims.n_heads):
        cut = slice(head * width, (head + 1) * width)
        total = total + own[..., cut] @ out_proj.weight[:, cut].T
    return total if out_proj.bias is None else total + out_proj.bias


def block_inputs(
    decoder: Decoder, index: int, trace: Trace, donor: State, dims: Dims
) -> dict[FineKind, BlockInputs]:
    """The three kinds of local change in one layer.

    Args:
        decoder: the receiving model.
        index: which layer.
        trace: its recorded run.
        donor: the donor's weights of this layer, by name within the layer.
        dims: component counts.

    Returns:
        `BlockInputs` by kind: ``head``, ``kv_group``, ``neuron``.
    """
    layer, call = decoder.layers[index], trace.calls[index]
    out_proj: nn.Module = layer.self_attn.o_proj
    down_proj: nn.Module = layer.mlp.down_proj

    def inputs(modules: Sequence[nn.Module], names: Sequence[str]) -> list[torch.Tensor]:
        swapped = {name: donor[name] for name in names if name in donor}
        hidden = call.hidden.detach()
        return inputs_of(modules, lambda: functional_call(layer, swapped, (hidden,), call.kwargs))

    own_attention, own_mlp = inputs([out_proj, down_proj], ())
    own_out: torch.Tensor = layer.self_attn.o_proj.weight
    own_down: torch.Tensor = layer.mlp.down_proj.weight
    return {
        "head": BlockInputs(
            own_attention,
            inputs([out_proj], _QUERY)[0],
            own_out,
            donor[_OUT],
            dims.n_heads,
        ),
        # heads of a group are neighbours, so a group is a block of the same width
        "kv_group": BlockInputs(
            own_attention,
            inputs([out_proj], _KEY_VALUE)[0],
            own_out,
            own_out,
            dims.n_kv_groups,
        ),
        "neuron": BlockInputs(
            own_mlp,
            inputs([down_proj], _GATE_UP)[0],
            own_down,
            donor[_DOWN],
            dims.n_neurons,
        ),
    }
