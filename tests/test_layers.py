"""Anchors layer by layer: steering against hooks on the whole model, stability against truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from mergekit_wp.cli import cli
from mergekit_wp.criteria import Reference
from mergekit_wp.errors import UserError
from mergekit_wp.mechanism.anchors import (
    LayerAnchor,
    best_anchor,
    direction_stability,
    find_anchors,
    recovered,
)
from mergekit_wp.mechanism.request import AnchorRequest
from mergekit_wp.statistics import Estimate
from tests.models import EOS, LETTERS, count_fetched, make_model, perturbed, save
from tests.test_scoring import Quiet

torch.set_num_threads(1)
PAIRS = [("abcx", "abc"), ("bdx", "bd"), ("cabdx", "cabd"), ("ddax", "dda"), ("acx", "ac")]


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers")
    base = make_model(request.param)
    save(base, root / "base")
    save(perturbed(base, 0.2), root / "expert")
    lines = [{"prompt": p, "contrast": c, "response": "ab"} for p, c in PAIRS]
    (root / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return root


def request_for(world: Path, **options: Any) -> AnchorRequest:
    settings: dict[str, Any] = {
        "base": str(world / "base"),
        "expert": str(world / "expert"),
        "prompts": world / "prompts.jsonl",
        "dtype": "float64",
        "batch_size": 2,
        "strength": 0.7,
        **options,
    }
    return AnchorRequest(**settings)


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def test_steering_equals_a_hook_on_the_whole_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_anchors(request_for(world), Quiet())
    base, expert = (
        AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64).eval()
        for name in ("base", "expert")
    )
    answer = [*ids_of("ab"), EOS]

    def values(model: Any) -> torch.Tensor:
        rows = []
        for prompt, _ in PAIRS:
            ids = torch.tensor([ids_of(prompt) + answer])
            with torch.no_grad():
                target = expert(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
                ours = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            rows.append(-(target.exp() * (target - ours)).sum(-1).mean())
        return torch.stack(rows)

    def state(text: str, layer: int) -> torch.Tensor:
        seen = []
        handle = expert.model.layers[layer].register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            expert(torch.tensor([ids_of(text)]))
        handle.remove()
        return seen[0][0, -1]

    assert [layer.layer for layer in found] == [0, 1]
    for layer in found:
        vector = torch.stack(
            [state(p, layer.layer) - state(c, layer.layer) for p, c in PAIRS]
        ).mean(0)
        steered = []
        for prompt, _ in PAIRS:
            first = len(prompt) - 1

            def add(_m: Any, _a: Any, out: Any, first: int = first, v: Any = vector) -> Any:
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                hidden[:, first] += 0.7 * v
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            ids = torch.tensor([ids_of(prompt) + answer])
            with torch.no_grad():
                target = expert(ids).logits[0].log_softmax(-1)[first:-1]
                handle = base.model.layers[layer.layer].register_forward_hook(add)
                ours = base(ids).logits[0].log_softmax(-1)[first:-1]
                handle.remove()
            steered.append(-(target.exp() * (target - ours)).sum(-1).mean())
        start = values(base).mean()
        want = (torch.stack(steered).mean() - start) / (0 - start)
        assert layer.steering.value == pytest.approx(float(want), abs=1e-9)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_weights_left_in_the_checkpoints_give_the_same_anchors(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, fetched = find_anchors(request_for(world), Quiet()), count_fetched(monkeypatch)
    spread = request_for(world, device_map="auto", max_memory={"cpu": 0})
    assert find_anchors(spread, Quiet()) == held and fetched


def test_stability_sees_a_direction_and_its_absence() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(0, 1, (40, 200)))
    shared = torch.from_numpy(rng.normal(0, 1, 200))
    assert abs(direction_stability(noise, 0).value) < 0.1
    # halves of 20: noise of 1/20 of a unit variance beside a shared part of variance 1
    assert direction_stability(noise + shared, 0).value == pytest.approx(1 / (1 + 1 / 20), abs=0.02)
    assert direction_stability(shared.expand(6, -1), 0) == Estimate(*[pytest.approx(1.0)] * 3)


def test_recovery_of_the_ends() -> None:
    reference = Reference(torch.tensor([-3.0, -1.0, -2.0]), torch.zeros(3))
    assert recovered(torch.zeros(3).double(), reference, 0).low == pytest.approx(1)
    assert recovered(reference.base.double(), reference, 0).high == pytest.approx(0)


def test_usable_needs_all_three() -> None:
    def layer(i: int, d: float, cosine: float, low: float) -> LayerAnchor:
        return LayerAnchor(i, d, Estimate(cosine, cosine, cosine), Estimate(low, low, low))

    layers = [layer(0, 9, 0.9, -0.1), layer(1, 2, 0.6, 0.1), layer(2, 3, 0.8, 0.2)]
    assert [x.usable for x in layers] == [False, True, True]
    assert not layer(3, 0.9, 0.9, 0.5).usable and not layer(3, 5, 0.4, 0.5).usable
    found = best_anchor(layers)
    assert found is not None and found.layer == 2
    assert best_anchor(layers[:1]) is None


def test_the_command(world: Path, tmp_path: Path) -> None:
    start = ["anchor", str(world / "base"), str(world / "expert")]
    given = ["--prompts", str(world / "prompts.jsonl"), "--dtype", "float64"]
    done = CliRunner().invoke(cli, [*start, *given])
    assert done.exception is None, done.exception
    assert "separation" in done.output and "usable" in done.output
    found = json.loads(CliRunner().invoke(cli, [*start, *given, "--json"]).output)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for arguments, message in (
        ([], "either --prompts FILE.jsonl or --builtin NAME"),
        ([*given, "--builtin", "capitals"], "either --prompts"),
        (["--builtin", "shouting"], "no built-in behaviour 'shouting'"),
        ([*given, "--max-prompts", "3"], "has 3 usable contrasts"),
    ):
        refused = CliRunner().invoke(cli, [*start, *arguments])
        assert isinstance(refused.exception, UserError), refused.output
        assert message in str(refused.exception)
    refused = CliRunner().invoke(cli, [*start, *given, "--strength", "0"])
    assert refused.exit_code == 2 and "'--strength': 0.0 is not in the range x>0" in refused.output
