"""The share integral: gradients times the task vector, step by step from base to expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mergekit_wp.components import Partition
from mergekit_wp.engine.integrated_gradients import contributions
from mergekit_wp.engine.task_vector import TaskVector, TensorContributions, midpoints
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.runs.recordings import Block, Result, SweepContext
from mergekit_wp.terms import SLICED_KINDS, Kind


def share_blocks(context: SweepContext, steps: int) -> Iterator[Block]:
    """The share integral, one step on one batch at a time.

    Yields:
        Blocks whose results hold contributions per prompt: ``[n, layers, count]`` under
        ``criterion/kind`` for sliced kinds, ``[n, tensors]`` under ``criterion/tensor``.
    """
    for s, position in enumerate(midpoints(steps)):
        for b, batch in enumerate(context.references.batches):
            yield Block(
                key=f"share.step{s:04d}.batch{b:04d}",
                cost=(2 + 2 * len(context.criteria)) * context.weight_of(batch),
                run=lambda position=position, b=b: _share(context, position, b),  # type: ignore[misc]
                b=b,
                prompts=0,
            )


def _share(context: SweepContext, position: float, b: int) -> Result:
    resident, partition = context.resident, context.partition
    resident.move_to(position)
    batch = context.batch(b)
    per_criterion = contributions(
        context.decoder,
        batch,
        partition,
        [task_vector(resident.pair, resident)],
        context.criteria,
        context.targets(b),
    )
    return {
        f"{c}/{kind}": value
        for c, (per_tensor,) in per_criterion.items()
        for kind, value in by_kind(partition, per_tensor, batch.size).items()
    }


def task_vector(pair: Pair, resident: ResidentModel) -> TaskVector:
    """A pair's task vector, streamed in the resident model's dtype to its device."""
    return TaskVector(lambda name: pair.delta(name, resident.dtype, resident.device), pair.changed)


def by_kind(
    partition: Partition, per_tensor: TensorContributions, n: int
) -> dict[Kind, torch.Tensor]:
    """Contributions summed into components.

    Args:
        partition: the components.
        per_tensor: ``[n, components of the tensor]`` by tensor name.
        n: number of prompts.

    Returns:
        float64 ``[n, layers, count]`` for sliced kinds; ``[n, tensors]`` for ``tensor``, every
        tensor with its whole sum.
    """
    dims = partition.dims
    found: dict[Kind, torch.Tensor] = {
        kind: torch.zeros((n, dims.n_layers, dims.count(kind)), dtype=torch.float64)
        for kind in SLICED_KINDS
    }
    found["tensor"] = torch.zeros((n, len(partition.tensor_names)), dtype=torch.float64)
    for i, name in enumerate(partition.tensor_names):
        if name not in per_tensor:
            continue
        layout, value = partition.layouts[name], per_tensor[name].cpu().double()
        found["tensor"][:, i] = value.sum(-1)
        if not layout.whole:
            partition.add(found, name, value)
    return found
