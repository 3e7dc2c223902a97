"""The one model in memory: base, expert, or anything between the two."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mergekit_wp.checkpoints import Pair, skeleton


class ResidentModel:
    """The one model in memory, whose weights are overwritten in place.

    Args:
        pair: where weights come from.
        dtype: dtype of weights and activations.
        device: torch device name.
    """

    def __init__(self, pair: Pair, dtype: torch.dtype, device: str) -> None:
        self.pair, self.dtype, self.device = pair, dtype, device
        self.model = skeleton(pair.base.config)
        if dtype == torch.float64 and hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # grouped products stop at float32
        weights = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, shape in pair.partition.shapes.items()
        }
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        self.model.requires_grad_(False)
        torch.nn.Module.to(self.model, device)  # buffers; weights are there already
        self.position: float | None = None

    @torch.no_grad()
    def move_to(self, position: float) -> None:
        """Set the weights to base + position * (expert - base); 0 and 1 are the checkpoints."""
        if position == self.position:
            return
        pair, self.position = self.pair, None
        for name, parameter in self.model.named_parameters():
            if position == 1.0:
                pair.expert.read(name, parameter)
            elif position == 0.0 or name not in pair.changed:
                pair.base.read(name, parameter)
            else:
                pair.between(name, position, parameter)
        self.position = position

    def release(self) -> None:
        """Give back the memory of the weights, for good: other processes hold the model now."""
        torch.nn.Module.to(self.model, "meta")

    @torch.no_grad()
    def fill(self, weight_of: Callable[[str], torch.Tensor]) -> None:
        """Overwrite every weight with the tensor of its name."""
        self.position = None
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weight_of(name))
