"""Going on with fewer sequences at once where memory runs out; values per prompt stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mergekit_wp.criteria import Targets
from mergekit_wp.errors import UserError
from mergekit_wp.memory import is_out_of_memory
from mergekit_wp.prompts import PromptBatch

T = TypeVar("T")


def fitting(
    size: int,
    run: Callable[[int], T],
    told: Callable[[str], None],
    forget: Callable[[], None] = lambda: None,
) -> tuple[int, T]:
    """Run with half as many sequences at once until memory suffices.

    Args:
        size: sequences at once to begin with.
        run: the work, from its start, with so many at once.
        told: of every step back.
        forget: frees what a failed try left.

    Returns:
        The size that fitted, and the result.

    Raises:
        UserError: there is not even memory for one sequence.
    """
    while True:
        try:
            return size, run(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                f"out of memory with one sequence at a time ({reason}); use shorter prompts, "
                "another --dtype or a larger --device"
            )
        size = (size + 1) // 2
        count = f"{size} sequences" if size > 1 else "one sequence"
        told(f"out of memory; going on with {count} per forward pass")


@dataclass
class AtOnce:
    """How many sequences go through the model together, for work that follows other work.

    Attributes:
        size: the present number.
        told: of every step back.
    """

    size: int
    told: Callable[[str], None]

    def run(self, work: Callable[[int], T]) -> T:
        """`fitting`, beginning with what fitted last."""
        self.size, found = fitting(self.size, work, self.told)
        return found


def target_part(batch: PromptBatch, targets: Targets, start: int, stop: int) -> Targets:
    """What some of a batch's samples are measured against."""
    if targets.expert_logprobs is None:
        return targets
    own = batch.in_part(start, stop)
    return replace(targets, expert_logprobs=targets.expert_logprobs[own])


def split(batch: PromptBatch, targets: Targets, size: int) -> list[tuple[PromptBatch, Targets]]:
    """A batch in parts of at most `size` samples, with what each is measured against."""
    if batch.size <= size:
        return [(batch, targets)]
    cuts = [(start, min(batch.size, start + size)) for start in range(0, batch.size, size)]
    return [(batch.part(*cut), target_part(batch, targets, *cut)) for cut in cuts]
