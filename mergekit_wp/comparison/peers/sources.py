"""What a peer merges: base and experts tensor by tensor, and, where it needs them, prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mergekit_wp.comparison.peers.prompted import PromptedExperts
from mergekit_wp.comparison.rows import Cost
from mergekit_wp.errors import UserError
from mergekit_wp.models.checkpoint import Checkpoint


@dataclass
class Sources:
    """Base and experts, read one tensor at a time.

    Attributes:
        base, experts: the checkpoints.
        names: of the model's parameters.
        matrices: those among them that are weights of linear layers, the head left out.
        device: where merging computes, in float32.
        open_prompts: opens the experts' prompts, None where there are none.
        cost: of what is learned at present.
    """

    base: Checkpoint
    experts: Sequence[Checkpoint]
    names: Sequence[str]
    matrices: frozenset[str]
    device: str
    open_prompts: Callable[[], PromptedExperts] | None = None
    cost: Cost = field(default_factory=Cost)

    @cached_property
    def prompted(self) -> PromptedExperts:
        """The experts' prompts and answers, opened when they are first asked for."""
        assert self.open_prompts is not None  # `Plan.check`
        return self.open_prompts()

    def spent(self, *, steps: int = 0, passes: int = 0) -> None:
        """Count what is spent on learning from the prompts."""
        self.cost = Cost(
            prompts=self.prompted.count,
            gradient_steps=self.cost.gradient_steps + steps,
            forward_passes=(self.cost.forward_passes or 0) + passes,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter of the base."""
        return self.base.header(name)[0]

    def size(self, name: str) -> int:
        """Numbers in a parameter."""
        return math.prod(self.shape(name))

    def vectors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's tensor ``[*shape]`` and task vectors ``[experts, *shape]``, in float32.

        Raises:
            UserError: an expert lacks the tensor, or has it in another shape.
        """
        base = self.base.tensor(name, torch.float32, self.device)
        found = base.new_empty((len(self.experts), *base.shape))
        for expert, out in zip(self.experts, found, strict=True):
            if (shape := expert.header(name)[0]) != tuple(base.shape):
                raise UserError(
                    f"{name} is {list(shape)} in '{expert.name}' and {list(base.shape)} in the "
                    "base; methods outside mergekit merge equal shapes only"
                )
            expert.read(name, out)
        return base, found - base

    def average(self, name: str, out: torch.Tensor) -> None:
        """Write the experts' mean into a tensor."""
        base, vectors = self.vectors(name)
        out.copy_(base + vectors.mean(0))
