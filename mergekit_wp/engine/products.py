"""A weight gradient times a difference, summed over all dimensions but those that gates lie along.

    G = sum over tokens t of p_t q_t^T        p runs along the rows, q along the columns

Where the difference is a product of two factors, neither it nor G is ever formed:

    sum over columns of G * (L R) = L * (P^T (Q R^T)), summed over the rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_IN_CACHE = 2**18  # entries whose product stays in a CPU's cache, where it costs least
#: along which dimensions gates lie, part by part; see `components.OwnGates`
GateDims = Sequence[tuple[int, ...]]


def products(gradient: torch.Tensor, delta: torch.Tensor, parts: GateDims) -> list[torch.Tensor]:
    """Sums of gradient * delta over all dimensions but those of each part.

    A sparse gradient has the rows of the tokens that were looked up, and costs no more than these.
    """
    if gradient.is_sparse:
        some = gradient.coalesce()
        [rows] = some.indices()
        every = zip(parts, products(some.values(), delta[rows], parts), strict=True)
        return [_at(rows, own, len(delta)) if 0 in dims else own for dims, own in every]
    gradient, delta = torch.atleast_1d(gradient, delta)
    left = [[d for d in range(gradient.dim()) if d not in dims] for dims in parts]
    found: list[tuple[list[torch.Tensor], list[int]]] = [([], others) for others in left]
    rows = len(gradient) if gradient.is_cuda else -(-_IN_CACHE // gradient[0].numel())
    for few, its in zip(gradient.split(rows), delta.split(rows), strict=True):
        product = few * its
        for sums, others in found:
            sums.append(product.sum(others) if others else product)
    return [torch.stack(sums).sum(0) if 0 in others else torch.cat(sums) for sums, others in found]


def _at(rows: torch.Tensor, found: torch.Tensor, count: int) -> torch.Tensor:
    """What was found of some rows, among all; 0 elsewhere."""
    return found.new_zeros(count, *found.shape[1:]).index_copy(0, rows, found)


@dataclass(frozen=True)
class Factors:
    """A matrix ``left @ right``: ``[rows, rank]`` and ``[rank, columns]``."""

    left: torch.Tensor
    right: torch.Tensor

    def products(self, p: torch.Tensor, q: torch.Tensor, parts: GateDims) -> list[torch.Tensor]:
        """The same as `products` of the matrix and the gradient P^T Q.

        Args:
            p: ``[tokens, rows]``.
            q: ``[tokens, columns]``.
            parts: as there, of two dimensions; not both at once.
        """
        dtype = torch.promote_types(p.dtype, torch.float32)
        left, right, p, q = (x.to(dtype) for x in (self.left, self.right, p, q))
        found = []
        for dims in parts:
            if dims == (0,):
                found.append((left * (p.T @ (q @ right.T))).sum(1))
            elif dims == (1,):
                found.append((right.T * (q.T @ (p @ left))).sum(1))
            else:
                assert not dims
                found.append(((p @ left) * (q @ right.T)).sum())
        return found
