"""Memory: how much is free and was used, and going on with fewer sequences where it runs out.

Values per prompt stay the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from mergekit_wp.errors import OutOfMemory

T = TypeVar("T")
#: more sequences than anything runs together
UNBOUNDED = sys.maxsize
GIB = 2**30
_STATUS = Path("/proc/self/status")
#: what allocators say that raise plain RuntimeErrors
_SAID = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def resident_memory() -> int:
    """Bytes of memory that this whole process has now, mapped files as far as they were read."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Most bytes of memory that this whole process has had at once.

    Linux's own mark goes first: what getrusage says begins with the peak of the process that
    started this one.
    """
    if _STATUS.exists():
        (mark,) = re.findall(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(mark) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_on_gpus() -> int:
    """Most bytes that tensors took on all GPUs together; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def in_gib(size: float) -> str:
    """As a text."""
    return f"{size / GIB:.2f} GiB"


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
