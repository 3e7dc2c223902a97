"""The merge of a recipe's experts in memory, at any gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from mergekit_wp.components import GateLayout
from mergekit_wp.joint.members import Member
from mergekit_wp.merging.fusion import fuse, take_rows
from mergekit_wp.models.pair import common_pieces
from mergekit_wp.models.resident import ResidentModel


def mix(
    resident: ResidentModel,
    members: Sequence[Member],
    layouts: Mapping[str, GateLayout],
    gate_of: Callable[[int, str], torch.Tensor],
) -> None:
    """Set the weights to the merge as the method would write it, a few rows at a time.

    Args:
        resident: overwritten.
        members: the experts.
        layouts: how the gates of every tensor lie.
        gate_of: gates of an expert, by its number, in a tensor: ``[gates of the tensor]``.
    """
    first = members[0].pair
    wide = torch.promote_types(resident.dtype, torch.float32)

    def write(name: str, out: torch.Tensor) -> None:
        moving = {
            member.pair.expert: gate
            for e, member in enumerate(members)
            if name in member.pair.changed and bool((gate := gate_of(e, name)).any())
        }
        if not moving:
            first.base.read(name, out)
            return
        parts = layouts[name].spread(torch.stack(list(moving.values())), out.shape)
        sides = (first.base, *moving)
        pieces = common_pieces(name, *sides)
        for found in zip(*(s.on_device(name, out.device, pieces) for s in sides), strict=True):
            rows = found[0][0]
            base, *experts = (part.to(wide) for _, part in found)
            out[rows] = fuse(base, experts, *take_rows(parts, rows))

    resident.fill(write)
