"""How gates climb: a hill whose top is known, the penalty, the weights of guards."""

from __future__ import annotations

import pytest
import torch

from mergekit_wp.joint.gates import Climb, penalty, penalty_slope, weights

torch.set_num_threads(1)


def test_climbing_a_hill_whose_top_is_known() -> None:
    top = torch.tensor([0.3, 0.9, 1.4, 2.0, -0.5], dtype=torch.float64)
    climb, values = Climb.at(torch.full((5,), 0.5)), []
    for _ in range(200):
        values.append(-float((climb.gates - top).square().sum()))
        climb = climb.step(-2 * (climb.gates - top), 0.05, 1.5)
    assert climb.gates.tolist() == pytest.approx([0.3, 0.9, 1.4, 1.5, 0.0], abs=0.02)
    assert values[20] > values[5] > values[0] and climb.steps == 200


def test_penalty() -> None:
    gates = torch.tensor([0.0, 0.2, 0.9, 1.2, 1.5], dtype=torch.float64, requires_grad=True)
    value = penalty(gates)
    value.backward()
    assert gates.grad is not None
    assert penalty_slope(gates.detach()).tolist() == pytest.approx(gates.grad.tolist())
    assert float(penalty(torch.zeros(3))) == 0 and float(penalty(torch.ones(3))) == 1


def test_guards_weigh_together() -> None:
    """Their weight beside the experts' does not depend on the number of files."""
    for behaviors, guards, weight in ((3, 1, 0.25), (2, 4, 0.25), (1, 2, 8.0)):
        found = weights(behaviors, guards, weight)
        assert len(found) == behaviors + guards and sum(found) == pytest.approx(1)
        assert len(set(found[:behaviors])) == len(set(found[behaviors:])) == 1
        assert sum(found[behaviors:]) / sum(found[:behaviors]) == pytest.approx(weight)
    assert weights(4, 0, 0.25) == [0.25] * 4
