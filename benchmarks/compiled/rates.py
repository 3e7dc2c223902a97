"""How well scores find a set, whatever stands equal counted as drawn by lot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from mergekit_wp.statistics import bootstrap

Array = np.ndarray


def auroc(scores: Array, positive: Array) -> float:
    """The chance that one of the set stands before one that is not in it."""
    n = int(positive.sum())
    above = rankdata(scores)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(scores) - n)))


def average_precision(scores: Array, positive: Array) -> float:
    """Precision by threshold, times the recall that it adds."""
    found = seen = 0.0
    total = 0.0
    for value in np.unique(scores)[::-1]:
        equal = scores == value
        hits = positive[equal].sum()
        found, seen = found + hits, seen + equal.sum()
        total += hits * found / seen
    return float(total / positive.sum())


def precision_at(k: int, scores: Array, positive: Array) -> float:
    """Of the first k, how many are in the set; those that stand equal at the border by part."""
    border = np.sort(scores)[::-1][k - 1]
    above, equal = scores > border, scores == border
    part = (k - above.sum()) / equal.sum()
    return float((positive[above].sum() + part * positive[equal].sum()) / k)


def interval(values: Array, groups: Sequence[str]) -> tuple[float, float, float]:
    """Mean with its 95% interval: programs are drawn again, each with all of its pairs."""
    names = sorted(set(groups))
    member = np.array([[group == name for group in groups] for name in names], float)
    weights = bootstrap(len(names), np.random.default_rng(0)) @ member
    drawn = weights @ values / weights.sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
