"""Merges of task vectors by their singular values. No data.

Both treat the weights of linear layers so and average everything else, as the authors' code does
with what is no matrix and with the output projection; embeddings are left to the average too.
"""

from __future__ import annotations

import torch

from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.rows import Setting


def tsv_merge(one: OneTensor, setting: Setting) -> torch.Tensor:
    """TSV-Merge (Gargiulo et al., arXiv 2412.00081) times ``lambda``."""
    if not one.matrix:
        return float(setting["lambda"]) * one.vectors.mean(0)
    return float(setting["lambda"]) * task_singular_vectors(one.vectors)


def iso_c(one: OneTensor, setting: Setting) -> torch.Tensor:
    """Iso-C (Marczak et al., arXiv 2502.04959) times ``lambda``."""
    if not one.matrix:
        return float(setting["lambda"]) * one.vectors.mean(0)
    return float(setting["lambda"]) * isotropic(one.vectors)


def task_singular_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Each expert's leading singular vectors side by side, made orthogonal, times their values.

    Of n experts each keeps an n-th of its singular values. Orthogonal is the nearest matrix with
    orthonormal columns, U·Vᵀ of the singular value decomposition (`TSVM_utils.py:
    compute_and_sum_svd_mem_reduction` of AntoAndGar/task_singular_vectors).

    Args:
        vectors: task vectors of one matrix, ``[experts, out, in]``.

    Returns:
        ``[out, in]``.
    """
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    kept = values.shape[1] // len(vectors)
    u = _orthogonal(torch.cat([*left[:, :, :kept]], 1))
    v = _orthogonal(torch.cat([*right[:, :kept]], 0))
    return u @ torch.diag(values[:, :kept].flatten()) @ v


def isotropic(vectors: torch.Tensor) -> torch.Tensor:
    """The sum of task vectors with all its singular values at their mean.

    As `src/utils/iso.py: iso_c` of danielm1405/iso-merging has it.

    Args:
        vectors: task vectors of one matrix, ``[experts, out, in]``.

    Returns:
        ``[out, in]``.
    """
    left, values, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    found: torch.Tensor = values.mean() * (left @ right)
    return found


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found: torch.Tensor = left @ right
    return found
