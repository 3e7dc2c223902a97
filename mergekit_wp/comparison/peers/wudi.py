"""WUDI-Merging (Cheng et al., arXiv 2503.08099): task vectors stand for the inputs. No data."""

from __future__ import annotations

import torch

from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.rows import Setting


def wudi(one: OneTensor, setting: Setting) -> torch.Tensor:
    """Linear layers by `least_interference`, the mean of everything else."""
    if not one.matrix:
        return one.vectors.mean(0)
    return least_interference(one.vectors, int(setting["steps"]), float(setting["rate"]))


def least_interference(vectors: torch.Tensor, steps: int, rate: float) -> torch.Tensor:
    """From the sum of task vectors, Adam's way down Σ_e ‖(τ − τ_e)·τ_eᵀ‖² / ‖τ_e‖².

    The paper's equation, as `wudi.py` of FusionBench and `lamassu.py` of nathanielyvo/WUDI-Merging
    have it. Its gradient 2·(τ·A − C), with A = Σ τ_eᵀτ_e/‖τ_e‖² and C = Σ τ_e·τ_eᵀτ_e/‖τ_e‖², is
    one product a step instead of two for each expert.

    Args:
        vectors: task vectors of one matrix, ``[experts, out, in]``.
        steps: of Adam.
        rate: its learning rate.

    Returns:
        ``[out, in]``.
    """
    norms = vectors.flatten(1).square().sum(1).clamp_min(torch.finfo(vectors.dtype).tiny)
    grams = vectors.mT @ vectors / norms[:, None, None]
    pull, goal = grams.sum(0), (vectors @ grams).sum(0)
    merged = torch.nn.Parameter(vectors.sum(0))
    adam = torch.optim.Adam([merged], lr=rate)
    with torch.no_grad():
        for _ in range(steps):
            merged.grad = 2 * (merged @ pull - goal)
            adam.step()
    return merged.detach()
