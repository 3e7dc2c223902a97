"""The task vector Δ = expert − base, streamed, and positions along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: contributions ``[n, components of the tensor]`` by tensor name
TensorContributions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TaskVector:
    """A streamed task vector; tensors that are not ``changed`` are zero and never read."""

    delta_of: Callable[[str], torch.Tensor]
    changed: frozenset[str]


def midpoints(steps: int) -> list[float]:
    """Positions of the midpoint rule on [0, 1]."""
    return [(i + 0.5) / steps for i in range(steps)]
