"""Stability of rankings: against scipy, by construction, and through the command."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mergekit_wp.stability import between_files, between_halves, jaccard


def test_jaccard() -> None:
    one, two = np.array([5.0, 4, 3, 2, 1, 0]), np.array([5.0, 0, 4, 1, 2, 3])
    assert jaccard(one, two, 2) == pytest.approx(1 / 3)  # {0, 1} and {0, 2}
    assert jaccard(one, one, 3) == 1


def test_halves_of_noise_and_of_signal() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=2000)
    distance = np.ones(40)
    noise = between_halves(rng.normal(size=(40, 2000)), distance, 0)
    assert noise is not None and abs(noise.spearman) < 0.05 and noise.jaccard < 0.05
    assert noise.top == 20
    clear = between_halves(truth + 0.01 * rng.normal(size=(40, 2000)), distance, 0)
    assert clear is not None and clear.spearman > 0.99 and clear.jaccard > 0.9
    # half of the prompts: signal variance 1, noise variance 4 / 20
    middle = between_halves(truth + 2 * rng.normal(size=(40, 2000)), distance, 0)
    assert middle is not None
    pearson = 1 / (1 + 4 / 20)
    expected = 6 / np.pi * np.arcsin(pearson / 2)  # of normal variables
    assert middle.spearman == pytest.approx(expected, abs=0.02)
    assert middle.low <= middle.spearman <= middle.high
    flipped = between_halves(-truth - 0.01 * rng.normal(size=(40, 2000)), -distance, 0)
    assert flipped is not None and flipped.spearman > 0.99, "a criterion that falls ranks as well"
    assert between_halves(np.ones((3, 2000)), np.ones(3), 0) is None, "three prompts"
    assert between_halves(np.ones((8, 2000)), np.ones(8), 0) is None, "scores that do not vary"
    assert between_halves(rng.normal(size=(8, 9)), np.ones(8), 0) is None, "nine components"


def test_between_files_is_spearman_with_an_interval_over_layers() -> None:
    rng = np.random.default_rng(1)
    one = np.round(rng.normal(size=(12, 100)), 1)  # with ties
    two = np.round(one + rng.normal(size=(12, 100)), 1)
    found = between_files(one, two, 0)
    assert found is not None
    want = scipy.stats.spearmanr(one.ravel(), two.ravel()).statistic
    assert found.spearman == pytest.approx(want, abs=1e-12)
    assert found.low < found.spearman < found.high
    # layers alike inside: as many independent numbers as layers, so a wide interval
    blocky = between_files(np.repeat(one[:, :1], 100, 1), np.repeat(two[:, :1], 100, 1), 0)
    assert blocky is not None and blocky.high - blocky.low > 4 * (found.high - found.low)
    assert between_files(np.ones((12, 100)), two, 0) is None
