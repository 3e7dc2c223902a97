"""Intervals and paired differences of a comparison, by resampling items (and seeds).

All rows of a comparison are measured on the same items, so a resample draws the items once and
takes them from every row: differences are paired. Where a row has several seeds, they are
resampled too, each row's on its own. Intervals are 95% percentile intervals; a lone rate of right
and wrong answers gets Wilson's, which does not vanish at 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.errors import UserError
from mergekit_wp.statistics import Array, Estimate, percentiles, wilson

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much better one row is than another on the same items.

    ``won`` and ``lost`` count items on which the first row's score (mean over its seeds) is higher
    or lower.
    """

    estimate: Estimate
    won: int
    lost: int

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """``better`` or ``worse`` only where the interval excludes zero."""
        if self.estimate.low > 0:
            return "better"
        return "worse" if self.estimate.high < 0 else "unclear"


class Resampled:
    """A comparison under resampling.

    Args:
        comparison: the rows, and those at equal perplexity; what failed is left out.
        n: resamples.
        seed: of the draws; the same seed gives the same intervals. A task's draws depend on the
            seed and its name, so that comparisons that share a task resample its items alike.

    Raises:
        UserError: relative to experts that get nothing right.
    """

    def __init__(self, comparison: Comparison, n: int = RESAMPLES, seed: int = 0) -> None:
        self.comparison, self.n = comparison, n
        self.rows = {row.name: row for row in comparison.rows if row.failed is None}
        self._every = self.rows | {row.name: row for row in comparison.equal.values()}
        self._counts: dict[str, Array] = {}
        self._draws: dict[tuple[str, str], Array] = {}
        if not self.rows:
            raise UserError(f"every row failed; the first: {comparison.rows[0].failed}")
        first = next(iter(self.rows.values()))
        for task in comparison.tasks:
            items = len(first.scores[task][0])
            rng = np.random.default_rng([seed, *task.encode()])
            drawn = rng.multinomial(items, np.full(items, 1 / items), size=n)
            self._counts[task] = drawn / items
        rng = np.random.default_rng(seed)
        self._seeds = {
            name: rng.multinomial(s, np.full(s, 1 / s), size=n) / s
            for name, row in self._every.items()
            if (s := len(next(iter(row.scores.values())))) > 1
        }

    @cached_property
    def _ceiling(self) -> dict[str, str]:
        """The best expert at each task."""
        experts = [row for row in self.rows.values() if row.role == "expert"]
        if not experts:
            raise UserError("every expert failed, so nothing can be relative to one")
        found = {}
        for task in self.comparison.tasks:
            top = max(experts, key=lambda row: self._raw(row.name, task))
            if self._raw(top.name, task) <= 0:
                raise UserError(f"task '{task}': no expert gets any item right")
            found[task] = top.name
        return found

    def _raw(self, name: str, task: str) -> float:
        return float(np.mean(self._every[name].scores[task]))

    def _raw_draws(self, name: str, task: str) -> Array:
        if (name, task) not in self._draws:
            scores = np.asarray(self._every[name].scores[task])
            per_seed = self._counts[task] @ scores.T
            weights = self._seeds.get(name)
            drawn = per_seed.mean(1) if weights is None else (per_seed * weights).sum(1)
            self._draws[name, task] = np.asarray(drawn)
        return self._draws[name, task]

    def task_value(self, name: str, task: str) -> float:
        """A row's mean on a task, relative to the best expert's where the comparison is."""
        value = self._raw(name, task)
        return value / self._raw(self._ceiling[task], task) if self.comparison.relative else value

    def task_draws(self, name: str, task: str) -> Array:
        """Resamples of `task_value`."""
        drawn = self._raw_draws(name, task)
        if not self.comparison.relative:
            return drawn
        ceiling = np.maximum(self._raw_draws(self._ceiling[task], task), 1e-12)
        return np.asarray(drawn / ceiling)

    def value(self, name: str) -> float:
        """A row's mean over tasks."""
        return float(np.mean([self.task_value(name, task) for task in self.comparison.tasks]))

    def draws(self, name: str) -> Array:
        """Resamples of `value`."""
        return np.asarray(np.mean([self.task_draws(name, t) for t in self.comparison.tasks], 0))

    def task(self, name: str, task: str) -> Estimate:
        """A row on one task, with its interval."""
        scores = self._every[name].scores[task]
        alone = len(scores) == 1 and not self.comparison.relative
        if alone and all(score in (0, 1) for score in scores[0]):
            return wilson(scores[0])
        return percentiles(self.task_value(name, task), self.task_draws(name, task))

    def mean(self, name: str) -> Estimate:
        """A row's mean over tasks, with its interval."""
        if len(self.comparison.tasks) == 1:
            return self.task(name, self.comparison.tasks[0])
        return percentiles(self.value(name), self.draws(name))

    def difference(self, a: str, b: str) -> Difference:
        """Row a minus row b, paired by item."""
        estimate = percentiles(self.value(a) - self.value(b), self.draws(a) - self.draws(b))
        won = lost = 0
        for task in self.comparison.tasks:
            ours = np.mean(self.rows[a].scores[task], axis=0)
            theirs = np.mean(self.rows[b].scores[task], axis=0)
            won += int((ours > theirs).sum())
            lost += int((ours < theirs).sum())
        return Difference(estimate, won, lost)


def best_peer(resampled: Resampled, tuned_only: bool = False) -> Row | None:
    """The peer with the highest mean on the test items."""
    peers = [row for row in resampled.rows.values() if row.role == "peer"]
    if tuned_only:
        peers = [row for row in peers if row.valid is not None]
    return max(peers, key=lambda row: resampled.value(row.name), default=None)
