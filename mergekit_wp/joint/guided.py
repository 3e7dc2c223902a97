"""The guided path: from the base towards all experts at once, moving only what helps.

The straight path B + a ΣΔ of several experts runs through models in which they disturb each
other. The guided path takes ``steps`` equal steps; in each, every component of every expert moves
1/steps further towards its expert if that raises the sum of the recovered behaviours there, to
first order, and stays where it is if not (after guided integrated gradients, Kapishnikov et al.,
arXiv 2106.09788; the rule and its use for merging are ours). How far a component came is its
``path`` score, the integral of what it brought on the way its ``share``. Pure maths: no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mergekit_wp.components import Partition
from mergekit_wp.engine.slopes import Slopes
from mergekit_wp.terms import SLICED_KINDS, Kind


@dataclass(frozen=True)
class PathPosition:
    """How far the components of one expert have come, and what that brought.

    Attributes:
        partition: the components.
        path: in [0, 1]; ``[layers, count]`` by sliced kind, ``[whole tensors]`` under ``tensor``.
        share: ``[components of the tensor]`` by tensor name; in total the recovery brought.
    """

    partition: Partition
    path: dict[Kind, torch.Tensor]
    share: dict[str, torch.Tensor]

    @classmethod
    def at_the_base(cls, partition: Partition) -> PathPosition:
        """Everything at the base."""
        dims = partition.dims
        path: dict[Kind, torch.Tensor] = {
            kind: torch.zeros((dims.n_layers, dims.count(kind)), dtype=torch.float64)
            for kind in SLICED_KINDS
        }
        path["tensor"] = torch.zeros(len(partition.whole_tensors), dtype=torch.float64)
        share = {
            name: torch.zeros(layout.count, dtype=torch.float64)
            for name, layout in partition.layouts.items()
        }
        return cls(partition, path, share)

    def gate(self, name: str) -> torch.Tensor:
        """How far each component of a tensor has come, ``[components of the tensor]``."""
        return self.partition.of_tensor(self.path, name)

    def step(self, slopes: Slopes, length: float) -> PathPosition:
        """Move every component that helps by ``length``, at most to 1.

        Args:
            slopes: at the present position; tensors without an entry do not matter.
            length: of the step.
        """
        total = PathPosition.at_the_base(self.partition).path
        for name, slope in slopes.items():
            self.partition.add(total, name, slope)
        path = {
            kind: torch.where(total[kind] > 0, (here + length).clamp(max=1.0), here)
            for kind, here in self.path.items()
        }
        moved = {kind: path[kind] - here for kind, here in self.path.items()}
        share = {
            name: here + self.partition.of_tensor(moved, name) * slopes[name]
            if name in slopes
            else here
            for name, here in self.share.items()
        }
        return PathPosition(self.partition, path, share)

    def share_scores(self) -> dict[Kind, torch.Tensor]:
        """``share`` in the shapes of a score file."""
        partition = self.partition
        scores: dict[Kind, torch.Tensor] = PathPosition.at_the_base(partition).path
        for name, values in self.share.items():
            partition.add(scores, name, values)
        sums = {name: values.sum() for name, values in self.share.items()}
        scores["tensor"] = torch.stack([sums[name] for name in partition.tensor_names])
        scores["layer"] = torch.zeros(partition.dims.n_layers, dtype=torch.float64)
        for name, layout in partition.layouts.items():
            if layout.layer is not None:
                scores["layer"][layout.layer] += sums[name]
        return scores


def path_scores(
    partition: Partition, path: Mapping[Kind, torch.Tensor]
) -> dict[Kind, torch.Tensor]:
    """Gates in the shapes of a score file; a tensor or layer has its components' mean.

    Args:
        partition: the components.
        path: ``[layers, count]`` by sliced kind, ``[whole tensors]`` under ``tensor``.
    """
    scores: dict[Kind, torch.Tensor] = {kind: path[kind] for kind in SLICED_KINDS}
    gates = {name: partition.of_tensor(path, name) for name in partition.tensor_names}
    scores["tensor"] = torch.stack([gates[name].mean() for name in partition.tensor_names])
    scores["layer"] = torch.stack(
        [
            torch.cat(
                [path[kind][layer] for kind in SLICED_KINDS]
                + [
                    gates[name]
                    for name in partition.whole_tensors
                    if partition.layouts[name].layer == layer
                ]
            ).mean()
            for layer in range(partition.dims.n_layers)
        ]
    )
    return scores
