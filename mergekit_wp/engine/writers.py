"""Where components write: the projections at the end of attention and MLP blocks.

A block's output is a sum over its components: what component c hands to the projection, times the
columns that it owns there. This module gives both as matrices, however a model stores them.
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
from mergekit_wp.engine.mixtures import columns, is_mixture, written
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
            seen[module] = writer.read(args).detach().view(*like.shape[:2], -1)

        return before

    with hooked([w.module.register_forward_pre_hook(keep(w)) for w in writers]):
        run()
    return [seen[writer.module] for writer in writers]
