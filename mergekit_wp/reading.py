"""Pieces of tensors on their way to the device that computes.

One thread that reads files fills a tenth of a GPU's bus. So for GPUs several read ahead, into
pinned memory, from which copies run beside the reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import EllipsisType

import numpy as np
import torch

#: part of a tensor along its first dimension, or all of it
Rows = slice | EllipsisType
Pieces = Sequence[Rows]
WHOLE: Pieces = (...,)
#: of threads, each with one piece in pinned memory, and as many pieces wait on the device
_THREADS = 8


def on_device(
    pieces: Pieces, read: Callable[[Rows], torch.Tensor], device: torch.device | str
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Pieces in their order, each on a device, in the dtype it is stored in.

    Args:
        pieces: of one tensor.
        read: reads one, on the CPU; several threads may call it.
        device: where to.

    Raises:
        UserError: what `read` raises.
    """
    if torch.device(device).type != "cuda":
        for rows in pieces:
            yield rows, read(rows).to(device)
        return
    coming: deque[tuple[Rows, Future[torch.Tensor]]] = deque()
    for rows in pieces:
        coming.append((rows, _threads().submit(_sent, read, rows, device)))
        if len(coming) == 2 * _THREADS:
            rows, part = coming.popleft()
            yield rows, part.result()
    for rows, part in coming:
        yield rows, part.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "reading")


def _sent(
    read: Callable[[Rows], torch.Tensor], rows: Rows, device: torch.device | str
) -> torch.Tensor:
    part = read(rows).contiguous()
    pinned = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    # torch's own copy would start threads in each of these
    to, source = (side.view(-1).view(torch.uint8).numpy() for side in (pinned, part))
    np.copyto(to, source)
    return pinned.to(device, non_blocking=True)
