"""Pieces of tensors on their way to the device that computes.

They are read by the files' bytes. safetensors would map the file anew for each of them: that takes
longer than reading a small one, and several threads wait for one another's pages.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import EllipsisType

import torch
from huggingface_hub import parse_local_safetensors_file_metadata

from mergekit_wp.errors import UserError
from mergekit_wp.models.refusals import FLOATS

#: part of a tensor along its first dimension, or all of it
Rows = slice | EllipsisType
Pieces = Sequence[Rows]
WHOLE: Pieces = (...,)
#: that read; twice as many pieces are on their way at once
_THREADS = 8


@dataclass(frozen=True)
class Span:
    """Where a file holds a tensor: from byte ``start`` on, row after row.

    Attributes:
        file: what tells the file from one that took its place.
    """

    path: Path
    file: tuple[int, int, int]
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of_file(cls, path: Path) -> dict[str, Span]:
        """All tensors of a safetensors file that are of floating point, by name."""
        file = _stamp(os.stat(path))  # first: a file that takes its place from here on is refused
        header = parse_local_safetensors_file_metadata(path)
        with open(path, "rb") as handle:
            data = 8 + int.from_bytes(handle.read(8), "little")
        return {
            name: cls(
                path,
                file,
                data + found.data_offsets[0],
                tuple(found.shape),
                getattr(torch, FLOATS[found.dtype]),
            )
            for name, found in header.tensors.items()
            if found.dtype in FLOATS
        }

    def read(self, rows: Rows, *, pin: bool = False) -> torch.Tensor:
        """Some rows, in memory of their own.

        Args:
            rows: which.
            pin: that memory, so that a copy to a GPU can go on beside other work.

        Raises:
            UserError: the file has changed since it was opened.
        """
        start, shape = self.start, self.shape
        row = math.prod(shape[1:]) * self.dtype.itemsize
        if isinstance(rows, slice):
            chosen = range(shape[0])[rows]
            start, shape = start + chosen.start * row, (len(chosen), *shape[1:])
        part = torch.empty(shape, dtype=self.dtype, pin_memory=pin)
        view = part.view(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as handle:
            handle.seek(start)
            count = 1
            while len(view) and count:
                count = handle.readinto(view)
                view = view[count:]
            if len(view) or _stamp(os.fstat(handle.fileno())) != self.file:
                raise UserError(
                    f"weight file {self.path} has changed since this run opened it; begin the run "
                    "again when it is whole"
                )
        return part


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def on_device(
    pieces: Pieces, read: Callable[[Rows], torch.Tensor], device: torch.device | str
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Pieces in their order, each on a device, in the dtype it is stored in.

    For a GPU several threads read ahead, and copies run beside the reading.

    Args:
        pieces: of one tensor.
        read: reads one, on the CPU; for a GPU, several threads call it.
        device: where to.

    Raises:
        UserError: what `read` raises.
    """
    if torch.device(device).type != "cuda":
        for rows in pieces:
            yield rows, read(rows).to(device)
        return
    yield from _ahead(pieces, lambda rows: _sent(read(rows), device))


def _ahead(
    pieces: Pieces, get: Callable[[Rows], torch.Tensor]
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Pieces in their order, while threads get those that follow."""
    coming: deque[tuple[Rows, Future[torch.Tensor]]] = deque()
    for rows in pieces:
        coming.append((rows, _threads().submit(get, rows)))
        if len(coming) == 2 * _THREADS:
            rows, part = coming.popleft()
            yield rows, part.result()
    for rows, part in coming:
        yield rows, part.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "reading")


def _sent(part: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    # torch keeps pinned memory until copies from it are done
    return part.to(device, non_blocking=part.is_pinned())
