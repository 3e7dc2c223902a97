"""One quantity over independent replications (training seeds), with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mergekit_wp.statistics import LEVEL, Array, Estimate, percentiles


@dataclass(frozen=True)
class Pooled:
    """Values of one quantity in independent replications, each a mean over its parts.

    ``values`` is ``[replications]``, ``draws`` ``[replications, resamples]``: what resampling the
    items within a replication gives.
    """

    values: Array
    draws: Array

    @classmethod
    def of(cls, parts: Mapping[int, Sequence[tuple[float, Array]]]) -> Pooled:
        """Replications from (value, resamples) of their parts, averaged."""
        values = [np.mean([value for value, _ in found]) for found in parts.values()]
        draws = [np.mean([drawn for _, drawn in found], axis=0) for found in parts.values()]
        return cls(np.asarray(values), np.asarray(draws))

    def __sub__(self, other: Pooled) -> Pooled:
        """Paired by replication and resample."""
        return Pooled(self.values - other.values, self.draws - other.draws)

    def bootstrap(self, seed: int = 0) -> Estimate:
        """Resample replications, then items; too narrow where there are few replications."""
        rng = np.random.default_rng(seed)
        n, r = len(self.values), self.draws.shape[1]
        chosen = rng.integers(n, size=(r, n))
        inner = rng.integers(r, size=(r, n))
        return percentiles(float(self.values.mean()), self.draws[chosen, inner].mean(1))

    def t_interval(self) -> Estimate:
        """Student's interval over replications, which is honest for few of them.

        Raises:
            ValueError: fewer than two replications.
        """
        n = len(self.values)
        if n < 2:
            raise ValueError("an interval over replications needs two of them")
        spread = self.values.std(ddof=1) / np.sqrt(n)
        reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * spread)
        mean = float(self.values.mean())
        return Estimate(mean, mean - reach, mean + reach)

    def over_both(self) -> Estimate:
        """Over replications and the items they share, resampled alike in all of them.

        What the items add at each end is added in squares to Student's reach over replications
        (MOVER; Zou and Donner 2008). An item's own part in a replication counts twice.

        Raises:
            ValueError: fewer than two replications.
        """
        over = self.t_interval()
        items = percentiles(over.value, self.draws.mean(0))
        low = np.hypot(over.value - over.low, items.value - items.low)
        high = np.hypot(over.high - over.value, items.high - items.value)
        return Estimate(over.value, float(over.value - low), float(over.value + high))
