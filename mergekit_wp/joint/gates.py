"""The gates of a fit and the steps that fit them: pure maths, no models.

    W(g) = B + sum over experts e and gates c of g_ec Delta_ec

where Delta_ec is the part of expert e's difference that gate c covers: a component, or less.

The derivative of any value with respect to g_ec is grad_W v . Delta_ec, see `engine.slopes`.
Adam (Kingma and Ba, arXiv 1412.6980) climbs the objective as far as limits allow; gates stay within
bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mergekit_wp.components import (
    GateLayout,
    Partition,
    Shape,
    TensorLayout,
    gate_layouts,
    positions,
)
from mergekit_wp.joint.weighing import LEAST, prices
from mergekit_wp.terms import FINE_KINDS, SLICED_KINDS, GateGranularity, Kind

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-12


@dataclass(frozen=True)
class Layout:
    """How the gates of several experts lie in one flat vector, one expert's after the other's.

    Attributes:
        partition: the components.
        changed: for each expert, the tensors in which it differs from the base; a gate that covers
            none of them is not fitted, and keeps 0.
        granularity: what each gate covers.
    """

    partition: Partition
    changed: tuple[frozenset[str], ...]
    granularity: GateGranularity = "component"

    @cached_property
    def layouts(self) -> Mapping[str, GateLayout]:
        """How the gates lie in every tensor."""
        if self.granularity == "component":
            return self.partition.layouts
        return gate_layouts(self.partition.dims, self.partition.shapes, self.granularity)

    @cached_property
    def _places(self) -> Mapping[str, slice | torch.Tensor]:
        """Where every tensor's gates stand among those of one expert."""
        if self.granularity != "component":
            return positions(self.layouts)
        views = self.by_kind(torch.arange(self._each))
        return {name: self.partition.of_tensor(views, name) for name in self.layouts}

    @cached_property
    def _each(self) -> int:
        """Gates of one expert."""
        if self.granularity != "component":
            return sum(layout.count for layout in self.layouts.values())
        return sum(math.prod(self._shape(kind)) for kind in FINE_KINDS)

    @property
    def size(self) -> int:
        """Gates in all."""
        return self._each * len(self.changed)

    def unflat(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat vector: the gates of each expert."""
        return list(flat.view(len(self.changed), self._each))

    def of_tensor(self, gates: torch.Tensor, name: str) -> torch.Tensor:
        """One expert's gates in a tensor, ``[gates of the tensor]``."""
        return gates[self._places[name]]

    def put(self, gates: torch.Tensor, name: str, new: torch.Tensor | float) -> None:
        """Set one expert's gates in a tensor, in place."""
        gates[self._places[name]] = new

    def collect(self, slopes: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """Sum derivatives by tensor into gates.

        Args:
            slopes: for each expert, ``[gates of the tensor]`` by tensor name.
        """
        flat = torch.zeros(self.size, dtype=torch.float64)
        for gates, found in zip(self.unflat(flat), slopes, strict=True):
            for name, slope in found.items():
                gates[self._places[name]] += slope
        return flat

    @property
    def fitted(self) -> torch.Tensor:
        """Which gates move anything."""
        flat = torch.zeros(self.size, dtype=torch.bool)
        for gates, changed in zip(self.unflat(flat), self.changed, strict=True):
            for name in changed:
                self.put(gates, name, True)
        return flat

    @cached_property
    def _groups(self) -> torch.Tensor:
        """Number of the group of each gate, see `deviation`."""
        numbers = torch.zeros(self._each, dtype=torch.int64)
        if self.granularity != "component":
            for number, name in enumerate(self.layouts):
                self.put(numbers, name, number)
        else:
            n_layers = self.partition.dims.n_layers
            for number, (kind, own) in enumerate(self.by_kind(numbers).items()):
                rows = torch.arange(n_layers).view(-1, 1) if kind != "tensor" else 0
                own.copy_(number * n_layers + torch.zeros_like(own) + rows)
        count = int(numbers.max()) + 1
        return torch.cat([numbers + e * count for e in range(len(self.changed))])

    def deviation(self, flat: torch.Tensor) -> torch.Tensor:
        """How far every fitted gate is from the mean of its group; 0 for the others.

        A group are the gates of one expert in one tensor, or of one kind of component in a layer;
        components that are whole tensors are one group.
        """
        fitted, groups = self.fitted.double(), self._groups
        count = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
        total = count.clone().index_add_(0, groups, flat * fitted)
        means = total / count.index_add_(0, groups, fitted).clamp_min(1)
        return (flat - means[groups]) * fitted

    @property
    def share(self) -> torch.Tensor:
        """What part of a weight's gate each has: half where a row's and a column's are added."""
        flat = torch.ones(self.size, dtype=torch.float64)
        for gates in self.unflat(flat):
            for name, layout in self.layouts.items():
                if not isinstance(layout, TensorLayout) and len(layout.parts) == 2:
                    self.put(gates, name, 0.5)
        return flat

    def _shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of one expert's components of one kind."""
        if kind == "tensor":
            return (len(self.partition.whole_tensors),)
        assert kind in SLICED_KINDS
        dims = self.partition.dims
        return (dims.n_layers, dims.count(kind))

    def by_kind(self, flat: torch.Tensor) -> dict[Kind, torch.Tensor]:
        """One value for each component, by kind."""
        views: dict[Kind, torch.Tensor] = {}
        start = 0
        for kind in FINE_KINDS:
            shape = self._shape(kind)
            views[kind] = flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        return views

    def path_scores(self, flat: torch.Tensor) -> list[dict[Kind, torch.Tensor]]:
        """Gates of each expert in the shapes of a score file: means over the weights.

        Where gates are finer, a component has their mean over its weights in changed tensors, and a
        tensor over all of its own; layers have the mean of their components.
        """
        found = []
        for gates, changed in zip(self.unflat(flat), self.changed, strict=True):
            if self.granularity == "component":
                found.append(_path_scores(self.partition, self.by_kind(gates)))
                continue
            components = replace(self, changed=(changed,), granularity="component")
            names = [name for name in self.layouts if name in changed]
            own = {name: (self.layouts[name], self.of_tensor(gates, name)) for name in names}
            scores = _path_scores(self.partition, components.by_kind(components.taking([own])))
            tensors = [
                _mean_over(_spread(*own[name], shape), (), shape)
                if name in own
                else torch.zeros((), dtype=torch.float64)
                for name, shape in self.partition.shapes.items()
            ]
            found.append(scores | {"tensor": torch.stack(tensors)})
        return found

    def taking(
        self, given: Sequence[Mapping[str, tuple[GateLayout, torch.Tensor]]]
    ) -> torch.Tensor:
        """Flat gates like given ones: as they are where these lie alike, means over weights if not.

        Coarser gates are spread, so that the weights stay as they were; finer ones are averaged.

        Args:
            given: for each expert, how the gates lie in a tensor, and ``[gates of the tensor]``.
        """
        flat = torch.zeros(self.size, dtype=torch.float64)
        weight = torch.zeros_like(flat)
        for gates, seen, own in zip(self.unflat(flat), self.unflat(weight), given, strict=True):
            alike = all(layout == self.layouts[name] for name, (layout, _) in own.items())
            for name, (layout, values) in own.items():
                if alike:
                    self.put(gates, name, values)
                    continue
                shape = self.partition.shapes[name]
                found, weights = _averaged(
                    self.layouts[name], _spread(layout, values, shape), shape
                )
                gates[self._places[name]] += found * weights
                seen[self._places[name]] += weights
        return flat / torch.where(weight > 0, weight, 1.0)


def _path_scores(
    partition: Partition, gates: Mapping[Kind, torch.Tensor]
) -> dict[Kind, torch.Tensor]:
    """One expert's gates in the shapes of a score file; tensor or layer: its components' mean.

    Args:
        partition: the components.
        gates: ``[layers, count]`` by sliced kind, ``[whole tensors]`` under ``tensor``.
    """
    scores: dict[Kind, torch.Tensor] = {kind: gates[kind] for kind in SLICED_KINDS}
    own = {name: partition.of_tensor(gates, name) for name in partition.tensor_names}
    scores["tensor"] = torch.stack([own[name].mean() for name in partition.tensor_names])
    whole = {
        layer: [n for n in partition.whole_tensors if partition.layouts[n].layer == layer]
        for layer in range(partition.dims.n_layers)
    }
    scores["layer"] = torch.stack(
        [
            torch.cat(
                [*(gates[kind][layer] for kind in SLICED_KINDS), *(own[n] for n in names)]
            ).mean()
            for layer, names in whole.items()
        ]
    )
    return scores


def _spread(layout: GateLayout, gates: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    """One expert's gates over a tensor: what is to be added, each in a shape that broadcasts."""
    return [part[0] for part in layout.spread(gates[None], shape)]


def _mean_over(parts: Sequence[torch.Tensor], dims: tuple[int, ...], shape: Shape) -> torch.Tensor:
    """Mean of the sum of some parts over all dimensions but ``dims``, in the sizes of these."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        others = [d for d in range(part.dim()) if d not in dims]
        total = total + (part.mean(others, keepdim=True) if others else part)
    sizes = [size if d in dims else 1 for d, size in enumerate(shape)]
    return total.expand(sizes).reshape([shape[d] for d in dims])


def _averaged(
    layout: GateLayout, parts: Sequence[torch.Tensor], shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of a tensor's gates over what others cover, and over how many weights, ``[count]``.

    A row's and a column's gate share the mean of the matrix evenly, as far as neither falls below
    0 by it; where gates differ along one of the two only, their sums are these gates again.
    """
    if isinstance(layout, TensorLayout):
        mean = _mean_over(parts, layout.dims, shape)
        if layout.whole:
            return mean.reshape(1), torch.tensor([float(math.prod(shape))], dtype=torch.float64)
        weights = layout.reduce(torch.ones_like(mean))
        others = math.prod(shape) / mean.numel()
        return layout.reduce(mean) / weights, weights * others
    means = [_mean_over(parts, dims, shape) for dims in layout.parts]
    if len(means) == 2:
        rows, columns = means
        mean = rows.mean(-1, keepdim=True)
        least = mean - columns.amin(-1, keepdim=True)
        share = (mean / 2).maximum(least).minimum(rows.amin(-1, keepdim=True))
        means = [rows - share, columns - (mean - share)]
    found = torch.cat([mean.reshape(-1, layout.block).mean(-1) for mean in means])
    return found, torch.ones_like(found)


def shrinking(layout: Layout, flat: torch.Tensor) -> torch.Tensor:
    """Slope of the mean over fitted gates of half their squared deviation, see `deviation`.

    Gates that few prompts have a say in follow the others of their tensor.
    """
    return layout.deviation(flat) / layout.fitted.sum()


@dataclass(frozen=True)
class Climb:
    """Where Adam stands.

    Attributes:
        gates: flat, float64.
        slopes: running means, ``[1 + guards, gates]``: of the behaviours' slope, of every guard's.
        second: running mean of the square of what was climbed.
        steps: taken so far.
        prices: of the guards in the last step; 0 where its limit did not count.
    """

    gates: torch.Tensor
    slopes: torch.Tensor
    second: torch.Tensor
    steps: int
    prices: torch.Tensor

    @classmethod
    def at(cls, gates: torch.Tensor, guards: int = 0) -> Climb:
        """A fresh start."""
        zero = torch.zeros_like(gates, dtype=torch.float64)
        slopes = zero.repeat(1 + guards, 1)
        return cls(gates.double(), slopes, zero, 0, torch.zeros(guards, dtype=torch.float64))

    def step(self, slopes: torch.Tensor, used: torch.Tensor, rate: float, upper: float) -> Climb:
        """One step uphill, held within [0, upper].

        Args:
            slopes: of the behaviours, and of minus what each guard uses, ``[1 + guards, gates]``.
            used: of what the guards' limits allow, ``[guards]``.
            rate: about how far a gate moves.
            upper: the largest gate.
        """
        steps = self.steps + 1
        running = _BETA1 * self.slopes + (1 - _BETA1) * slopes
        means = running / (1 - _BETA1**steps)
        # by the last prices, for those of this step are found in the scale that it takes
        weighed = _weights(self.prices).unsqueeze(1) * slopes
        # at first slopes must not cancel out: a scale without end would decide everything
        square = weighed.sum(0).square() if self.steps else weighed.square().sum(0)
        second = _BETA2 * self.second + (1 - _BETA2) * square
        scale = rate / ((second / (1 - _BETA2**steps)).sqrt() + _EPSILON)
        found = prices(used, means[0], means[1:], scale)
        # a gate at its bound that would go beyond it helps no guard
        ahead = scale * (_weights(found) @ means)
        at_bound = ((self.gates <= 0) & (ahead < 0)) | ((self.gates >= upper) & (ahead > 0))
        if at_bound.any():
            found = prices(used, means[0], means[1:], scale * ~at_bound)
        move = scale * (_weights(found) @ means)
        return Climb((self.gates + move).clamp(0.0, upper), running, second, steps, found)


def _weights(found: torch.Tensor) -> torch.Tensor:
    """What behaviours and guards weigh, ``[1 + guards]``."""
    return torch.cat([torch.ones(1, dtype=torch.float64), found.clamp_min(LEAST)])
