"""Intervals and differences against closed forms and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.pooled import Pooled
from mergekit_wp.comparison.resampling import Resampled, best_peer
from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.errors import UserError
from mergekit_wp.statistics import wilson

RNG = np.random.default_rng(0)
A = RNG.integers(0, 2, 40).astype(float).tolist()
B = RNG.integers(0, 2, 40).astype(float).tolist()


def comparison(relative: bool = False, **rows: dict[str, list[list[float]]]) -> Comparison:
    tasks = tuple(next(iter(rows.values())))
    made = []
    for name, scores in rows.items():
        role = "expert" if name.startswith("expert") else "ours" if name == "ours" else "peer"
        made.append(Row(name, role, scores=scores))
    return Comparison(tuple(made), tasks, relative, "ours")


def test_paired_interval_agrees_with_scipy() -> None:
    found = Resampled(comparison(ours={"t": [A]}, ties={"t": [B]}), 20_000).difference(
        "ours", "ties"
    )
    want = stats.bootstrap(
        (np.array(A) - np.array(B),), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert found.estimate.value == pytest.approx(np.mean(A) - np.mean(B))
    assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(want), abs=0.03)
    assert found.won == sum(a > b for a, b in zip(A, B, strict=True))
    assert found.lost == sum(a < b for a, b in zip(A, B, strict=True))


def test_draws_follow_the_exact_distribution() -> None:
    scores = [0.0, 0.5, 2.0]
    exact = np.array([np.mean(x) for x in itertools.product(scores, repeat=3)])
    drawn = Resampled(comparison(ours={"t": [scores]}), 40_000).draws("ours")
    for value in np.unique(exact.round(6)):
        share = float(np.isclose(exact, value).mean())
        assert float(np.isclose(drawn, value).mean()) == pytest.approx(share, abs=0.01)


def test_the_same_row_twice_is_no_difference() -> None:
    found = Resampled(comparison(ours={"t": [A]}, twin={"t": [A]})).difference("ours", "twin")
    assert (found.estimate.low, found.estimate.high, found.won, found.lost) == (0, 0, 0, 0)
    assert found.verdict == "unclear"


def test_only_an_interval_beyond_zero_is_a_verdict() -> None:
    good, bad = [1.0] * 30 + [0.0] * 10, [1.0] * 10 + [0.0] * 30
    made = Resampled(comparison(ours={"t": [good]}, ties={"t": [bad]}))
    assert made.difference("ours", "ties").verdict == "better"
    assert made.difference("ties", "ours").verdict == "worse"
    near = [1.0] * 29 + [0.0] * 11
    made = Resampled(comparison(ours={"t": [good]}, ties={"t": [near]}))
    assert made.difference("ours", "ties").verdict == "unclear"


def test_wilson_against_known_numbers() -> None:
    # Wilson (1927), as computed by R's binom::binom.confint
    found = wilson([0.0] * 32)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(0.1072, abs=1e-3)
    made = Resampled(comparison(ours={"t": [[1.0] * 32]})).mean("ours")
    assert made.high == pytest.approx(1) and made.low == pytest.approx(0.8928, abs=1e-3)


def test_relative_divides_by_the_best_expert_of_the_same_resample() -> None:
    half = [1.0, 0.0] * 20
    full = comparison(
        True,
        ours={"t": [half], "u": [[1.0] * 40]},
        expert_a={"t": [half], "u": [[0.0] * 40]},
        expert_b={"t": [[0.0] * 40], "u": [[1.0] * 40]},
    )
    made = Resampled(full)
    assert made.value("ours") == 1
    # the same items are right, so the ratio is 1 in every resample
    assert np.ptp(made.draws("ours")) == pytest.approx(0)
    assert made.value("expert_a") == 0.5


def test_relative_to_nothing_is_refused() -> None:
    made = comparison(True, ours={"t": [A]}, expert_a={"t": [[0.0] * 40]})
    with pytest.raises(UserError, match="task 't': no expert gets any item right"):
        Resampled(made).value("ours")


def test_seeds_widen_the_interval() -> None:
    first, second = [1.0] * 40, [0.0] * 40
    made = Resampled(comparison(ours={"t": [first, second]}, ties={"t": [[0.5] * 40]}))
    mean = made.mean("ours")
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.5, 0, 1))
    assert made.mean("ties").low == pytest.approx(0.5)


def test_same_seed_same_numbers_and_failed_rows_are_left_out() -> None:
    rows = comparison(ours={"t": [A]}, ties={"t": [B]})
    broken = Row("sce", "peer", failed="no memory")
    both = Comparison((*rows.rows, broken), rows.tasks, False, "ours")
    assert Resampled(rows, 50).mean("ties") == Resampled(both, 50).mean("ties")
    best = best_peer(Resampled(both))
    assert best is not None and best.name == "ties"


def test_comparisons_resample_the_items_of_a_shared_task_alike() -> None:
    one = Resampled(comparison(ours={"s": [B], "t": [A]}), 50)
    other = Resampled(comparison(ours={"t": [A], "u": [B]}), 50)
    assert np.array_equal(one.task_draws("ours", "t"), other.task_draws("ours", "t"))
    assert not np.array_equal(one.task_draws("ours", "s"), other.task_draws("ours", "u"))


def test_pooled_intervals() -> None:
    values = [0.1, 0.4, 0.3]
    exact = Pooled.of({s: [(v, np.full(2000, v))] for s, v in enumerate(values)})
    # items add nothing here: the bootstrap is that of the three values
    every = [np.mean(x) for x in itertools.product(values, repeat=3)]
    found = exact.bootstrap()
    assert found.low == pytest.approx(np.quantile(every, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(every, 0.975, method="inverted_cdf"))
    want = stats.ttest_1samp(values, 0).confidence_interval()
    t = exact.t_interval()
    assert (t.low, t.high) == pytest.approx((want.low, want.high))
    assert (exact - exact).t_interval().value == 0
    assert exact.over_both() == t  # items add nothing
    shared = np.random.default_rng(0).normal(0, 0.5, 2000)
    both = Pooled.of({s: [(v, v + shared)] for s, v in enumerate(values)}).over_both()
    low = np.hypot(both.value - want.low, -np.quantile(shared, 0.025))
    assert both.value - both.low == pytest.approx(low)
    mean = Pooled.of({0: [(0.2, np.zeros(3)), (0.4, np.ones(3))]})
    assert mean.values.tolist() == pytest.approx([0.3]) and mean.draws.tolist() == [[0.5] * 3]
    with pytest.raises(ValueError, match="needs two"):
        mean.t_interval()


@pytest.mark.slow
def test_coverage() -> None:
    """Of 200 paired comparisons, about 95% of the intervals hold the truth."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        a, b = (rng.random(80) < 0.6).astype(float), (rng.random(80) < 0.45).astype(float)
        rows = comparison(ours={"t": [a.tolist()]}, ties={"t": [b.tolist()]})
        found = Resampled(rows, 1000).difference("ours", "ties").estimate
        held += found.low <= 0.15 <= found.high
    assert 0.90 <= held / 200 <= 0.99
