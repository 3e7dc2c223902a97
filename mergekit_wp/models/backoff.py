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


@dataclass
class AtOnce:
    """How many sequences go through the model together: half as many where memory runs out.

    Attributes:
        size: the present number.
        told: of every step back.
        forget: frees what a failed try left.
    """

    size: int
    told: Callable[[str], None]
    forget: Callable[[], None] = lambda: None

    def run(self, work: Callable[[int], T], count: int | None = None) -> T:
        """Its result, with as many at once as fit, beginning with what fitted last.

        Args:
            work: from its start, with so many at once.
            count: there are no more than so many this time.

        Raises:
            OutOfMemory: there is not even memory for one sequence.
        """
        size = begun = self.size if count is None else min(self.size, count)
        while True:
            try:
                found = work(size)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "out of memory"
            self.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise OutOfMemory(
                    f"out of memory with one sequence at a time ({reason}); use shorter prompts, "
                    "a dtype of fewer bytes or a larger device"
                )
            size = (size + 1) // 2
            together = f"{size} sequences" if size > 1 else "one sequence"
            self.told(f"out of memory; going on with {together} per forward pass")
        if size < begun:
            self.size = size
        return found
