"""How stable a ranking of components is: between halves of the prompts, and between score files.

Pure maths. A correlation between two files is to be read beside that between halves: no ranking
agrees with another one better than with itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.integrate import trapezoid

Array = npt.NDArray[np.float64]

SPLITS, RESAMPLES = 50, 2000
#: the leaders compared are the top 1% of a kind, five at least
TOP, MIN_TOP = 0.01, 5
#: fewer prompts have no halves worth comparing
MIN_PROMPTS = 4


@dataclass(frozen=True)
class Likeness:
    """Rank correlation with its 95% interval, and the Jaccard overlap of the top ``top``."""

    spearman: float
    low: float
    high: float
    jaccard: float
    top: int


def leaders(n: int) -> int | None:
    """How many leaders of `n` components are compared; None where they would be most of them."""
    k = max(MIN_TOP, round(TOP * n))
    return k if 2 * k <= n else None


def jaccard(one: Array, two: Array, k: int) -> float:
    """Overlap of the two sets of the highest `k`, first come of equals."""
    sets = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def between_halves(changes: Array, distance: Array, seed: int) -> Likeness | None:
    """Likeness of the rankings by two random halves of the prompts, over many splits.

    Args:
        changes: what each component changes, ``[prompts, components]``.
        distance: between base and expert, ``[prompts]``.
        seed: of the splits.

    Returns:
        None with fewer than four prompts, too few components, or scores that do not vary.
    """
    n = len(changes)
    k = leaders(changes.shape[1])
    if n < MIN_PROMPTS or k is None:
        return None
    rng = np.random.default_rng(seed)
    correlations, overlaps = [], []
    for _ in range(SPLITS):
        order = rng.permutation(n)
        parts = (order[: n // 2], order[n // 2 :])
        one, two = (changes[part].mean(0) * np.sign(distance[part].mean()) for part in parts)
        if np.ptp(one) == 0 or np.ptp(two) == 0:
            return None
        ranks = (stats.rankdata(one), stats.rankdata(two))
        correlations.append(float(np.corrcoef(*ranks)[0, 1]))
        overlaps.append(jaccard(one, two, k))
    low, high = np.quantile(correlations, (0.025, 0.975)).tolist()
    return Likeness(float(np.mean(correlations)), low, high, float(np.mean(overlaps)), k)


def between_files(one: Array, two: Array, seed: int) -> Likeness | None:
    """Likeness of two rankings of the same components.

    The interval resamples layers, as components of one layer are not independent of each other;
    single numbers per layer are resampled by themselves.

    Args:
        one: ``[layers, count]`` or ``[components]``.
        two: shaped alike.
        seed: of the resampling.

    Returns:
        None with too few components, or scores that do not vary.
    """
    k = leaders(one.size)
    if k is None or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    x, y = (stats.rankdata(v).reshape(len(v), -1) for v in (one, two))
    # sums by layer suffice: a resampled correlation is one of sums of sums
    moments = np.stack([np.full(len(x), x.shape[1]), *(m.sum(1) for m in _products(x, y))], 1)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES)
    drawn = _correlation(counts @ moments)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    value = float(_correlation(moments.sum(0)[None])[0])
    return Likeness(value, low, high, jaccard(one.ravel(), two.ravel(), k), k)


def _products(x: Array, y: Array) -> Iterator[Array]:
    yield from (x, y, x * x, y * y, x * y)


def _correlation(sums: Array) -> Array:
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
    return found


#: parts of all components that circuits of MIB (Mueller et al., arXiv 2504.13151) have
MIB_PARTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def mib_sizes(total: int) -> list[int]:
    """How many of `total` components the parts are, one at least; the last is all."""
    return [math.ceil(part * total) for part in MIB_PARTS]


@dataclass(frozen=True)
class Faithfulness:
    """Two areas of MIB (arXiv 2504.13151) for the faithfulness of circuits of growing size.

    Attributes:
        cpr: integrated circuit performance ratio: under the faithfulness; higher is better, and
            values above 1 make up for others below.
        cmd: integrated circuit-model distance: between the faithfulness and 1; 0 is best.
    """

    cpr: float
    cmd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Faithfulness:
        """By trapezoids over the part of all components, from 0.1% to all of them.

        Args:
            values: faithfulness at each of `MIB_PARTS`: 0 is the corrupted model, 1 the whole one.
        """
        height = np.array(values, dtype=np.float64)
        areas = (trapezoid(height, MIB_PARTS), trapezoid(np.abs(1 - height), MIB_PARTS))
        return cls(*map(float, areas))


LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def percentiles(value: float, draws: Array) -> Estimate:
    """A value with the percentile interval of its resamples."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def wilson(scores: Sequence[float]) -> Estimate:
    """Wilson's interval of a rate of items that are right (1) or wrong (0)."""
    right = round(sum(scores))
    interval = stats.binomtest(right, len(scores)).proportion_ci(LEVEL, method="wilson")
    return Estimate(right / len(scores), float(interval.low), float(interval.high))
