"""How stable a ranking of components is: between halves of the prompts, and between score files.

Pure maths. A correlation between two files is to be read beside that between halves: no ranking
agrees with another one better than with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
#: components of like noise are shrunk together, in so many groups; overlaps that are to be expected
#: are means over so many drawn pairs
_BINS, _PAIRS = 20, 12


#: leaders are stable where two scorings on other prompts share four fifths of them: this Jaccard
STABLE = 2 / 3
#: prompts are counted up to so many times as many as there are
FURTHEST = 32


@dataclass(frozen=True)
class Likeness:
    """Rank correlation with its 95% interval, and the Jaccard overlap of the top ``top``.

    ``needed``: how many prompts stable leaders need, between halves only; None where it cannot be
    told, or is more than `FURTHEST` times as many as there are.
    """

    spearman: float
    low: float
    high: float
    jaccard: float
    top: int
    needed: int | None = None


def n_leaders(n: int) -> int | None:
    """How many leaders of `n` components are compared; None where they would be most of them."""
    k = max(MIN_TOP, round(TOP * n))
    return k if 2 * k <= n else None


def jaccard(one: Array, two: Array, k: int) -> float:
    """Overlap of the two sets of the highest `k`, first come of equals."""
    sets = [set(_highest(values, k)) for values in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def _highest(values: Array, k: int) -> list[int]:
    """Places of the highest `k`, first come of equals."""
    least = np.partition(values, -k)[-k]
    above, equal = (values > least).nonzero()[0], (values == least).nonzero()[0]
    return [*above.tolist(), *equal[: k - len(above)].tolist()]


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
    k = n_leaders(changes.shape[1])
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
    overlap = float(np.mean(overlaps))
    needed = prompts_needed(changes, distance, k, overlap, seed)
    return Likeness(float(np.mean(correlations)), low, high, overlap, k, needed)


def prompts_needed(
    changes: Array, distance: Array, k: int, overlap: float, seed: int
) -> int | None:
    """How many prompts a scoring needs so that its top `k` are stable (`STABLE`).

    Extrapolated from halves: each component has a score and a standard deviation over prompts. Of
    components with like deviations, scores are shrunk by the part of their variance that is noise;
    then all scores by one factor, with which two rankings by half of the prompts, drawn with
    that noise, overlap as the real halves do. More prompts make the same draws less noisy.

    Args:
        changes: what each component changes, ``[prompts, components]``.
        distance: between base and expert, ``[prompts]``.
        k: how many leaders.
        overlap: of the halves' leaders, Jaccard.
        seed: of the draws.

    Returns:
        None where halves overlap no more than noise of these sizes alone would, by a tenth, or more
        than `FURTHEST` times these prompts are needed.
    """
    n = len(changes)
    ratio = changes.mean(0) / distance.mean()
    spread = (changes - distance[:, None] * ratio).std(0, ddof=1) / abs(distance.mean())
    shrunk = np.zeros_like(ratio)
    for alike in np.array_split(np.argsort(spread), min(_BINS, len(spread))):
        if power := np.mean(ratio[alike] ** 2):
            noise = np.mean(spread[alike] ** 2) / n
            shrunk[alike] = ratio[alike] * np.sqrt(max(0.0, 1 - noise / power))

    def expected(prompts: float, scale: float) -> float:
        rng = np.random.default_rng(seed)
        pairs = (rng.standard_normal((2, len(ratio))) for _ in range(_PAIRS))
        noisy = (scale * shrunk + spread / math.sqrt(prompts) * noise for noise in pairs)
        return float(np.mean([jaccard(one, two, k) for one, two in noisy]))

    if overlap < expected(n / 2, 0.0) + 0.1:
        return None
    scale = _crossing(lambda s: expected(n / 2, s), overlap, 0.01, 100.0)
    if expected(FURTHEST * n, scale) < STABLE:
        return None
    return round(_crossing(lambda m: expected(m, scale), STABLE, 1.0, FURTHEST * n))


def _crossing(rising: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a rising function reaches a level, within 1% of that place; `high` if it does not."""
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rising(middle) >= level else (middle, high)
    return high


def leads(changes: Array, distance: Array, seed: int, draws: int) -> npt.NDArray[np.uint8] | None:
    """In how many bootstrap draws over prompts each component is among the leaders.

    Args:
        changes: what each component changes, ``[prompts, components]``.
        distance: between base and expert, ``[prompts]``.
        seed: of the draws.
        draws: how many, 255 at most.

    Returns:
        ``[components]``; None with fewer than four prompts, or too few components.
    """
    n = len(changes)
    k = n_leaders(changes.shape[1])
    if n < MIN_PROMPTS or k is None:
        return None
    rng = np.random.default_rng(seed)
    found = np.zeros(changes.shape[1], dtype=np.uint8)
    for counts in rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64):
        scores = counts @ changes * np.sign(counts @ distance)
        # what changes nothing leads nothing, however few do
        found[[i for i in _highest(scores, k) if scores[i] != 0]] += 1
    return found


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
    k = n_leaders(one.size)
    if k is None or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    x, y = (stats.rankdata(v).reshape(len(v), -1) for v in (one, two))
    # sums by layer suffice: a resampled correlation is one of sums of sums
    moments = np.stack([np.full(len(x), x.shape[1]), *(m.sum(1) for m in _products(x, y))], 1)
    drawn = _correlation(bootstrap(len(x), np.random.default_rng(seed)) @ moments)
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


def bootstrap(n: int, rng: np.random.Generator) -> Array:
    """How often each of `n` items is drawn, with replacement, by resample: ``[RESAMPLES, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


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
