"""The engine's benchmark itself, small."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine.accelerator import run, table
from benchmarks.engine.bench import measured
from benchmarks.engine.inputs import cases, heads_and_neurons, open_case
from benchmarks.engine.measure import floor_formula, restart_formula

torch.set_num_threads(1)


@pytest.mark.slow
def test_contestants_agree_on_the_zoo_within_the_restart_formula() -> None:
    inputs = open_case(cases()["zoo"], 4, torch.float32, "cpu")
    rows = measured(inputs, heads_and_neurons(inputs.partition, 8), 24)
    assert all(row["largest score difference"] < 1e-5 for row in rows)
    engine = [row for row in rows if row["what"] == "(c) engine"]
    assert len(engine) == 2
    assert all(row["FLOPs / restart formula"] < 1.15 for row in engine)
    assert all(row["times (a), FLOPs"] > 2 for row in engine)


@pytest.mark.slow
def test_an_accelerators_run_on_a_tiny_shape(capsys: pytest.CaptureFixture[str]) -> None:
    run("tiny", "cpu", torch.float32, 3, 16, 2)
    said = capsys.readouterr().out
    assert said.count("of the matrix product's throughput") == 3


def test_formulas_by_hand() -> None:
    inputs = open_case(cases()["zoo"], 1, torch.float32, "cpu")
    heads = heads_and_neurons(inputs.partition, 0)
    shapes = inputs.partition.shapes
    p = sum(
        shapes[n][0] * shapes[n][1]
        for n in inputs.partition.layer_tensors(0)
        if len(shapes[n]) == 2
    )
    # four heads in each of two layers below a depth of 2
    assert restart_formula(inputs.partition, heads, 10, 2) == 4 * 2 * p * 10 * (2 + 1)
    assert floor_formula(inputs.partition, heads, 10, 2) == 8 * p * 10 * 2
    assert "Computed, not measured" in table(1, 8, 1e12, 1e9)
