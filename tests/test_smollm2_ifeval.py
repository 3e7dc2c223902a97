"""The real-model benchmark's rules, requests, statistics and random control."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.smollm2.control import random_control
from benchmarks.smollm2.curve import Point, table
from benchmarks.smollm2.evaluate import capital_fraction, mcnemar
from benchmarks.smollm2.ifeval import CAPITALS, identity, request_of, split_of, split_requests
from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.files import scorefile
from tests.factory import make_score_file


def test_capital_fraction_sees_near_misses() -> None:
    assert capital_fraction("ABC d") == 0.75
    assert capital_fraction("12") == 0.0


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("Write a poem about a cat. Use no commas.", "Write a poem about a cat."),
        ('Is "Go! Go." by P. Diddy fun? Use JSON.', 'Is "Go! Go." by P. Diddy fun?'),
        ("Write a poem in all capital letters. It is for kids.", None),
        ("I have a dime. What can I buy?", None),
        ("Write a riddle without an end mark", None),
        ("WRITE IT DOWN FOR ME PLEASE.", None),
        ("Write it.", None),
    ],
)
def test_request_of(prompt: str, request_: str | None) -> None:
    assert request_of(prompt) == request_


def test_splits_are_disjoint_and_leave_out_the_capitals_prompts() -> None:
    rows = [
        {"prompt": f"Write a poem about topic {i}. No commas.", "instruction_id_list": ["x:y"]}
        for i in range(200)
    ]
    rows += [{"prompt": "write a Poem about topic, 5!", "instruction_id_list": ["x:y"]}]
    rows += [{"prompt": "Write a poem about topic 7. Shout.", "instruction_id_list": [CAPITALS]}]
    rows += [{"prompt": "Write a tale about one dog.", "instruction_id_list": ["language:x"]}]
    splits = split_requests(rows)
    every = [identity(request) for requests in splits.values() for request in requests]
    assert len(every) == len(set(every)) == 199
    assert identity("Write a poem about topic 7.") not in every
    assert all(split_of(request) == split for split, rs in splits.items() for request in rs)
    assert len(splits["train"]) > len(splits["test"]) > len(splits["score"]) > 0


def test_mcnemar_against_the_binomial() -> None:
    assert mcnemar([True] * 4, [True] * 4) == (0, 0, 1.0)
    assert mcnemar([False] * 5 + [True], [True] * 5 + [True]) == (0, 5, 2 / 2**5)
    assert mcnemar([True, False, False], [False, True, True]) == (1, 2, 1.0)


def test_random_control_moves_scores_but_keeps_each_kinds_own(tmp_path: Path) -> None:
    dims = Dims(n_layers=4, n_heads=8, n_kv_groups=4, n_neurons=6, architecture=LLAMA)
    file = make_score_file(dims=dims, criteria=("kl", "anchor"))
    control = random_control(file, seed=0)
    scorefile.write(control, tmp_path / "control.safetensors")
    read = scorefile.read(tmp_path / "control.safetensors")
    assert read.manifest.behavior.startswith("random control")
    assert read.delta_norm == file.delta_norm
    moved, original = read.fine_scores("share", "kl"), file.fine_scores("share", "kl")
    for kind in ("head", "kv_group", "neuron", "tensor"):
        before, after = (x[kind].flatten().sort().values for x in (original, moved))
        assert torch.equal(before, after)
        assert not torch.equal(moved[kind], original[kind])
    assert torch.equal(random_control(file, seed=0).tensors["share/kl/neuron"], moved["neuron"]), (
        "the seed fixes the draw"
    )


def test_table_puts_the_draws_beside_the_score() -> None:
    points = [Point("caps", 0.1, 9, 10), Point("random0", 0.1, 0, 10), Point("random1", 0.1, 2, 10)]
    assert table(points, "caps").splitlines()[1].split() == (
        ["10%", "0.90", "[0.60,", "0.98]", "0.10", "(0.00,", "0.20)"]
    )
