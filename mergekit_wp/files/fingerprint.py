"""How near the norm of a task vector must be to the one in a file to be of the same models."""

from __future__ import annotations

import torch

#: Relative difference allowed between a task vector's norm and the one in the score file.
NORM_TOLERANCE = 0.02


def rounding(tensor: torch.Tensor, stored: str) -> float:
    """Largest norm that rounding to the tensor's dtype can have added to a difference.

    Rounding to nearest moves an entry by at most half an ulp, u|x|, or half the smallest
    subnormal; by nothing where the dtype is as fine as the one that was stored.
    """
    was = getattr(torch, stored.removeprefix("torch."), None)
    if not isinstance(was, torch.dtype) or not was.is_floating_point:
        was = torch.float64
    seen, fine = torch.finfo(tensor.dtype), torch.finfo(was)
    allowed = 0.0
    if seen.eps > fine.eps:
        norm = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)
        allowed += seen.eps / 2 * float(norm)
    if seen.tiny > fine.tiny:
        allowed += seen.smallest_normal * seen.eps / 2 * float(tensor.numel() ** 0.5)
    return allowed
