"""The merge of a recipe's experts in memory, at any gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mergekit_wp.joint.members import Member
from mergekit_wp.merging.fusion import fuse
from mergekit_wp.models.pair import common_pieces
from mergekit_wp.models.resident import ResidentModel


def mix(
    resident: ResidentModel,
    members: Sequence[Member],
    gate_of: Callable[[int, str], torch.Tensor],
) -> None:
    """Set the weights to the merge as the method would write it, a few rows at a time.

    Args:
        resident: overwritten.
        members: the experts.
        gate_of: gates of an expert, by its number, in a tensor: ``[components of the tensor]``.
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
        layout = first.partition.layouts[name]
        gates = torch.stack([layout.expand(gate, out.shape) for gate in moving.values()])
        sides = (first.base, *moving)
        pieces = common_pieces(name, *sides)
        for found in zip(*(s.on_device(name, out.device, pieces) for s in sides), strict=True):
            rows = found[0][0]
            base, *experts = (part.to(wide) for _, part in found)
            spread = gates if gates.dim() < 2 or gates.shape[1] == 1 else gates[:, rows]
            out[rows] = fuse(base, experts, spread)

    resident.fill(write)
