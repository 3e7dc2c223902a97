"""Going on with fewer sequences at once where memory runs out; values per prompt stay the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mergekit_wp.errors import OutOfMemory
from mergekit_wp.models.memory import is_out_of_memory

T = TypeVar("T")
#: more sequences than anything runs together
UNBOUNDED = sys.maxsize


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
        OutOfMemory: there is not even memory for one sequence.
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
            raise OutOfMemory(
                f"out of memory with one sequence at a time ({reason}); use shorter prompts, "
                "a dtype of fewer bytes or a larger device"
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
        forget: frees what a failed try left.
    """

    size: int
    told: Callable[[str], None]
    forget: Callable[[], None] = lambda: None

    def run(self, work: Callable[[int], T], count: int | None = None) -> T:
        """`fitting`, beginning with what fitted last.

        Args:
            work: from its start, with so many at once.
            count: there are no more than so many this time.
        """
        begun = self.size if count is None else min(self.size, count)
        fitted, found = fitting(begun, work, self.told, self.forget)
        if fitted < begun:
            self.size = fitted
        return found
