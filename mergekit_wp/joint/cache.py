"""Base and experts in main memory, as far as a budget goes, so that steps do not read their files.

Tensors are kept as they are stored, not as differences: these would have to be rounded to be as
small, and a merge would no longer be the same to the last bit. Of LoRA experts the factors are kept
beside the model that they change, which is often the base and then there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from mergekit_wp.errors import UserError, option
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.lora import Adapter
from mergekit_wp.models.memory import free_memory, in_gib
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.refusals import FLOATS

#: a parameter of the model in a folder
Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class CachePlan:
    """What of base and experts is kept in main memory.

    Attributes:
        models: the base's and the experts', by their folders.
        adapters: of experts that have one.
        chosen: what is kept of the models.
        size: bytes of it, with the adapters.
        total: bytes of all that a step reads.
    """

    models: Mapping[str, Checkpoint]
    adapters: tuple[Adapter, ...]
    chosen: tuple[Key, ...]
    size: int
    total: int

    @classmethod
    def of(cls, pairs: Sequence[Pair], budget: int) -> CachePlan:
        """As much of what steps read as fits into a budget, layer after layer.

        Args:
            pairs: the base and each expert.
            budget: bytes.

        Raises:
            UserError: it does not hold one layer, or more than there is memory for.
        """
        names = {pairs[0].base.path: set(pairs[0].partition.tensor_names)}
        models = {pairs[0].base.path: pairs[0].base}
        for pair in pairs:
            models.setdefault(pair.expert.path, pair.expert)
            names.setdefault(pair.expert.path, set()).update(pair.changed)
        sizes = {
            (path, name): _size(model, name)
            for name in pairs[0].partition.tensor_names
            for path, model in models.items()
            if name in names[path]
        }
        adapters = tuple(p.expert.adapter for p in pairs if p.expert.adapter is not None)
        size = factors = sum(adapter.size for adapter in adapters)
        least = factors + _largest_layer(pairs[0], sizes)
        given = option("cache", in_gib(budget))
        if budget < least:
            raise UserError(
                f"{given}: one layer of the base and all experts takes {in_gib(least)}; give at "
                "least so much, or leave it out"
            )
        chosen = []
        for key, own in sizes.items():
            if size + own <= budget:
                chosen.append(key)
                size += own
        if size > (free := free_memory("cpu")):
            raise UserError(
                f"{given}: {in_gib(size)} of weights fit into it, but only {in_gib(free)} of main "
                "memory are free; give less"
            )
        return cls(models, adapters, tuple(chosen), size, factors + sum(sizes.values()))


def keep_weights(
    pairs: Sequence[Pair], budget: int, device: str, told: Callable[[str], None]
) -> None:
    """Read what fits into a budget for the last time.

    Args:
        pairs: the base and each expert.
        budget: bytes.
        device: that computes; for a GPU it is pinned memory.
        told: how much is kept.

    Raises:
        UserError: see `CachePlan.of`.
    """
    plan = CachePlan.of(pairs, budget)
    for adapter in plan.adapters:
        adapter.keep()
    for path, name in plan.chosen:
        plan.models[path].keep(name, pin=torch.device(device).type == "cuda")
    for side in (side for pair in pairs for side in (pair.base, pair.expert)):
        side.kept = plan.models[side.path].kept
    told(f"cache: {in_gib(plan.size)} of {in_gib(plan.total)} of weights are kept in main memory")


def _size(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a parameter as it is stored."""
    shape, dtype = checkpoint.header(name)
    itemsize: int = getattr(torch, FLOATS[dtype]).itemsize
    return math.prod(shape) * itemsize


def _largest_layer(pair: Pair, sizes: Mapping[Key, int]) -> int:
    partition = pair.partition
    layers = [set(partition.layer_tensors(i)) for i in range(partition.dims.n_layers)]
    return max(sum(s for (_, name), s in sizes.items() if name in layer) for layer in layers)
