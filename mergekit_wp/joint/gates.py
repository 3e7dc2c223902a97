"""Component gates and the steps that fit them: pure maths, no models.

    W(g) = B + sum over experts e and components c of g_ec Delta_ec

The derivative of any value with respect to g_ec is grad_W v . Delta_ec, see `engine.slopes`.
Adam (Kingma and Ba, arXiv 1412.6980) climbs the objective; gates stay within bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.components import Partition
from mergekit_wp.terms import FINE_KINDS, SLICED_KINDS, Kind

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-12


@dataclass(frozen=True)
class Layout:
    """How the gates of several experts lie in one flat vector.

    Attributes:
        partition: the components.
        changed: for each expert, the tensors in which it differs from the base; a component none
            of whose tensors differ has no gate to fit, and keeps 0.
    """

    partition: Partition
    changed: tuple[frozenset[str], ...]

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of one expert's gates of one kind."""
        if kind == "tensor":
            return (len(self.partition.whole_tensors),)
        assert kind in SLICED_KINDS
        dims = self.partition.dims
        return (dims.n_layers, dims.count(kind))

    def unflat(self, flat: torch.Tensor) -> list[dict[Kind, torch.Tensor]]:
        """Views of a flat vector: for each expert, gates by kind."""
        found: list[dict[Kind, torch.Tensor]] = []
        start = 0
        for _ in self.changed:
            gates: dict[Kind, torch.Tensor] = {}
            for kind in FINE_KINDS:
                shape = self.shape(kind)
                size = torch.Size(shape).numel()
                gates[kind] = flat[start : start + size].view(shape)
                start += size
            found.append(gates)
        return found

    @property
    def size(self) -> int:
        """Gates in all."""
        every = sum(torch.Size(self.shape(kind)).numel() for kind in FINE_KINDS)
        return every * len(self.changed)

    def collect(self, slopes: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Sum derivatives by tensor into components.

        Args:
            slopes: for each expert, ``[components of the tensor]`` by tensor name.
        """
        flat = torch.zeros(self.size, dtype=torch.float64)
        for gates, found in zip(self.unflat(flat), slopes, strict=True):
            for name, slope in found.items():
                self.partition.add(gates, name, slope)
        return flat

    @property
    def fitted(self) -> torch.Tensor:
        """Which gates move anything."""
        flat = torch.zeros(self.size, dtype=torch.float64)
        for gates, changed in zip(self.unflat(flat), self.changed, strict=True):
            for name in changed:
                ones = torch.ones(self.partition.layouts[name].count, dtype=torch.float64)
                self.partition.put(gates, name, ones)
        return flat.bool()


def weights(behaviors: int, guards: int, guard_weight: float) -> list[float]:
    """Weight in the objective of every behaviour and then of every guard; they sum to 1.

    Behaviours share 1 evenly and guards share ``guard_weight``, before both are divided by their
    sum: how much is guarded does not depend on how many files it is spread over.
    """
    if not guards:
        return [1 / behaviors] * behaviors
    whole = 1 + guard_weight
    return [1 / behaviors / whole] * behaviors + [guard_weight / guards / whole] * guards


def penalty(gates: torch.Tensor) -> torch.Tensor:
    """Mean of g + g|1 - g|: 0 at 0, 1 at 1 with no slope from below, steep above 1.

    It pulls towards few gates and round ones.
    """
    return (gates + gates * (1 - gates).abs()).mean()


def penalty_slope(gates: torch.Tensor) -> torch.Tensor:
    """Derivative of `penalty` by each gate."""
    slope = torch.where(gates <= 1, 2 - 2 * gates, 2 * gates)
    return slope / gates.numel()


@dataclass(frozen=True)
class Climb:
    """Where Adam stands.

    Attributes:
        gates: flat, float64.
        first: running mean of the slope.
        second: running mean of its square.
        steps: taken so far.
    """

    gates: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    steps: int

    @classmethod
    def at(cls, gates: torch.Tensor) -> Climb:
        """A fresh start."""
        zero = torch.zeros_like(gates, dtype=torch.float64)
        return cls(gates.double(), zero, zero.clone(), 0)

    def step(self, slope: torch.Tensor, rate: float, upper: float) -> Climb:
        """One step uphill, held within [0, upper]."""
        steps = self.steps + 1
        first = _BETA1 * self.first + (1 - _BETA1) * slope
        second = _BETA2 * self.second + (1 - _BETA2) * slope.square()
        mean, spread = first / (1 - _BETA1**steps), (second / (1 - _BETA2**steps)).sqrt()
        gates = (self.gates + rate * mean / (spread + _EPSILON)).clamp(0.0, upper)
        return replace(self, gates=gates, first=first, second=second, steps=steps)
