"""Where components write: the projections at the end of attention and MLP blocks.

A block's output is a sum over its components: what component c hands to the projection, times the
columns that it owns there. This module gives both as matrices, however a model stores them.

The experts of a mixture have their weights stacked in one tensor. The neurons of all experts of a
layer count as the neurons of one wide MLP: neuron j of expert e is number e * neurons + j. A
position writes through the experts that the router sends it to, weighted as the router says; the
router is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.engine.decoder import Decoder, hooked
from mergekit_wp.models.offloaded import here
from mergekit_wp.terms import FineKind


@dataclass(frozen=True)
class Writer:
    """A block's output projection.

    Attributes:
        module: that computes it; experts of a mixture compute all of their MLPs.
        name: of its weight, within the layer.
    """

    module: nn.Module
    name: str

    @classmethod
    def of(cls, decoder: Decoder, layer: int, kind: FineKind) -> Writer:
        """The projection that reads what a kind writes, in one layer."""
        name = decoder.architecture.out(kind)
        return cls(decoder.layers[layer].get_submodule(module_of(name)), name)

    @property
    def weight(self) -> torch.Tensor:
        """The model's own `columns`; fetched anew each time where the model is offloaded."""
        return self.columns(here(getattr(self.module, self.name.rpartition(".")[2])))

    @property
    def bias(self) -> torch.Tensor | None:
        """What the block adds besides, None where it adds nothing."""
        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else here(bias)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this projection as ``[hidden, width]``, columns in the order of components.

        Args:
            weight: as the model stores it; ``[experts, hidden, neurons]`` for a mixture.
        """
        if isinstance(self.module, Conv1D):
            return weight.T
        return columns(weight) if is_mixture(self.module) else weight

    def read(self, args: tuple[Any, ...]) -> torch.Tensor:
        """What components hand to the projection: ``[..., width]``, given the module's input."""
        x: torch.Tensor = args[0]
        return written(self.module, *args) if is_mixture(self.module) else x


def read_by(
    writers: Sequence[Writer], run: Callable[[], object], like: torch.Tensor
) -> list[torch.Tensor]:
    """What is handed to projections while `run` runs, ``[n, T, width]`` each.

    Args:
        writers: the projections.
        run: a pass through the layer.
        like: ``[n, T, hidden]``, what it is run on.
    """
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(writer: Writer) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[module] = writer.read(args).view(*like.shape[:2], -1)

        return before

    with hooked([w.module.register_forward_pre_hook(keep(w)) for w in writers]):
        run()
    return [seen[writer.module] for writer in writers]


def is_mixture(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of several experts."""
    return getattr(module, "gate_up_proj", torch.empty(0)).dim() == 3


def columns(down: torch.Tensor) -> torch.Tensor:
    """Down projections ``[experts, hidden, neurons]`` side by side: ``[hidden, all neurons]``."""
    return down.permute(1, 0, 2).flatten(1)


def written(
    experts: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What all neurons hand to the down projections.

    Args:
        experts: the module with the stacked weights.
        x: its input, ``[N, hidden]``.
        chosen: which experts each position goes to, ``[N, k]``.
        weights: how much each of them counts, ``[N, k]``.

    Returns:
        ``[N, all neurons]``, already weighted; 0 where a position does not go.
    """
    gate, up = _rows(here(experts.gate_up_proj), x)
    found: torch.Tensor = experts.act_fn(gate) * up * _counts(gate, chosen, weights)
    return found.flatten(1)


def contribution(
    experts: Any,
    parameter: str,
    delta: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    g: torch.Tensor,
) -> torch.Tensor:
    """grad_W . Delta of one stacked tensor by position and neuron, ``[N, all neurons]``.

    Args:
        experts: the module with the stacked weights.
        parameter: ``gate_up_proj`` or ``down_proj``.
        delta: the task vector at this parameter.
        inputs: what the module was called with, see `written`.
        g: gradient of the summed values with respect to its output, ``[N, hidden]``.
    """
    x, chosen, weights = inputs
    if parameter == "down_proj":
        return written(experts, x, chosen, weights) * (g @ columns(delta))
    with torch.enable_grad():
        both = [part.detach().requires_grad_() for part in _rows(here(experts.gate_up_proj), x)]
        handed = experts.act_fn(both[0]) * both[1] * _counts(both[0], chosen, weights)
        along = (handed.flatten(1) * (g @ columns(here(experts.down_proj)))).sum()
        gradients = torch.autograd.grad(along, both)
    gate, up = _rows(delta, x)
    return (gradients[0] * gate + gradients[1] * up).flatten(1)


def _rows(gate_up: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up projections of all experts, ``[N, experts, neurons]`` each."""
    gate, up = torch.einsum("erh,nh->ner", gate_up, x).chunk(2, -1)
    return gate, up


def _counts(like: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How much every expert counts at every position, ``[N, experts, 1]``."""
    found = like.new_zeros(like.shape[:2])
    return found.scatter_add(1, chosen, weights.to(like)).unsqueeze(-1)
