"""Sets of fine components: chosen by score, matched at random, and swapped together. Pure maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mergekit_wp.components import Partition
from mergekit_wp.terms import Kind

#: members of a set: booleans in the shapes of `ScoreFile.fine_scores`
Members = Mapping[Kind, torch.Tensor]


def extreme(scores: Mapping[Kind, torch.Tensor], size: int, largest: bool = True) -> Members:
    """The ``size`` components with the highest (or lowest) scores, first come first of equals.

    Args:
        scores: by kind of the fine partition.
        size: members; at most all of them.
        largest: the highest, else the lowest.
    """
    flat = torch.cat([part.flatten().double() for part in scores.values()])
    order = torch.sort(flat, descending=largest, stable=True).indices
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[:size]] = True
    return _shaped(chosen, scores)


def matched(members: Members, generator: torch.Generator) -> Members:
    """A random set with as many members of every kind."""
    found = {}
    for kind, part in members.items():
        drawn = torch.zeros(part.numel(), dtype=torch.bool)
        order = torch.randperm(part.numel(), generator=generator)
        drawn[order[: int(part.sum())]] = True
        found[kind] = drawn.view(part.shape)
    return found


def _shaped(flat: torch.Tensor, like: Mapping[Kind, torch.Tensor]) -> Members:
    found, start = {}, 0
    for kind, part in like.items():
        found[kind] = flat[start : start + part.numel()].view(part.shape)
        start += part.numel()
    return found


def swapped(
    partition: Partition,
    members: Members,
    inside: Callable[[str], torch.Tensor],
    outside: Callable[[str], torch.Tensor],
) -> Callable[[str], torch.Tensor]:
    """Weights of a model whose members come from one checkpoint and the rest from another.

    Args:
        partition: the components.
        members: the set; kinds that are missing have none.
        inside: tensor by name, of the checkpoint that gives the members.
        outside: tensor by name, of the other one.

    Returns:
        Tensor by name.
    """

    def weight_of(name: str) -> torch.Tensor:
        layout = partition.layouts[name]
        mask = _of_tensor(partition, members, name)
        if mask is None or not mask.any():
            return outside(name)
        theirs = inside(name)
        if mask.all():
            return theirs
        where = layout.expand(mask, theirs.shape).to(theirs.device)
        return torch.where(where, theirs, outside(name))

    return weight_of


def _of_tensor(partition: Partition, members: Members, name: str) -> torch.Tensor | None:
    owners = partition.layouts[name].owners
    if not any(kind in members for kind, _ in owners):
        return None
    n_layers = partition.dims.n_layers
    none: dict[Kind, torch.Tensor] = {
        kind: torch.zeros((n_layers, count), dtype=torch.bool)
        for kind, count in owners
        if kind not in members
    }
    return partition.of_tensor({**none, **members}, name)
