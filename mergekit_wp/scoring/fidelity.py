"""How well estimates predict exact scores: selection of what to verify, and the verdict."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.stats
import torch

from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.terms import ScoringMethod


def leaders(scores: torch.Tensor, k: int) -> list[int]:
    """Flat indices of the `k` largest |score|, ties by index."""
    order = torch.sort(scores.flatten().abs(), descending=True, stable=True).indices
    return order[:k].tolist()


def uniform_sample(candidates: torch.Tensor, k: int, seed: int) -> list[int]:
    """`k` flat indices drawn uniformly without replacement where `candidates` is true."""
    places = candidates.flatten().nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator)
    return places[order[:k]].tolist()


def _correlation(kind: str, first: np.ndarray, second: np.ndarray) -> float | None:
    if len(first) < 3:
        return None
    function = scipy.stats.pearsonr if kind == "pearson" else scipy.stats.spearmanr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input: the NaN below says it
        value = float(function(first, second).statistic)
    return value if np.isfinite(value) else None


def verdict(
    predicted: torch.Tensor,
    exact: torch.Tensor,
    top: list[int],
    random: list[int],
    method: ScoringMethod,
) -> Fidelity:
    """Compare predictions with exact scores.

    Leaders are swapped because much may be wrong with them: the largest error seen there and among
    random components bounds that of the others.

    Args:
        predicted: estimated scores of a kind.
        exact: exact scores, flat; read at `top` and `random` only.
        top: the leaders.
        random: the uniform sample.
        method: ``first-order`` or ``second-order``.
    """
    pairs = torch.stack([predicted.flatten(), exact.flatten()]).double().numpy()
    both, drawn = pairs[:, sorted({*top, *random})], pairs[:, random]
    missed = [abs(float(exact[i])) for i in set(random) - set(top)]
    errors = np.abs(both[0] - both[1])
    largest = float(errors.max()) if errors.size else None
    others = np.delete(np.abs(pairs[0]), sorted({*top, *random}))
    return Fidelity(
        method=method,
        verified_top=len(top),
        verified_random=len(random),
        pearson=_correlation("pearson", *both),
        spearman=_correlation("spearman", *both),
        pearson_random=_correlation("pearson", *drawn),
        largest_missed=max(missed, default=None),
        largest_error=largest,
        bound=None if largest is None or not others.size else float(others.max()) + largest,
    )
