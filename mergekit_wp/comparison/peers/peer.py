"""What a peer is: what it learns first, and how one tensor is merged by that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting

#: what a peer has learned, by names of its own; a tensor is read when it is asked for
Learned: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class OneTensor:
    """One tensor to be merged.

    Attributes:
        name: of the parameter.
        base: of the base, ``[*shape]``.
        vectors: experts minus base, ``[experts, *shape]``.
        matrix: whether it is the weight of a linear layer; embeddings and the head are not.
        learned: what the peer has learned.
    """

    name: str
    base: torch.Tensor
    vectors: torch.Tensor
    matrix: bool
    learned: Learned


#: the merge's difference from the base, ``[*shape]``
Rule: TypeAlias = Callable[[OneTensor, Setting], torch.Tensor]


def nothing(_sources: Sources, _setting: Setting) -> dict[str, torch.Tensor]:
    """Learn nothing."""
    return {}


@dataclass(frozen=True)
class Peer:
    """A merge method of this room.

    Attributes:
        rule: merges one tensor.
        learn: what comes before, from all tensors or from prompts.
        depends_on: parameters that what is learned depends on.
        needs_prompts: whether it learns from the experts' prompts.
    """

    rule: Rule
    learn: Callable[[Sources, Setting], dict[str, torch.Tensor]] = nothing
    depends_on: tuple[str, ...] = ()
    needs_prompts: bool = False

    @property
    def learns(self) -> bool:
        """Whether it learns anything before it merges."""
        return self.learn is not nothing
