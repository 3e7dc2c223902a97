"""Scores estimated from gradients: the second order, what is swapped, what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.components import Component
from mergekit_wp.engine.gradients import CORRECTING_PROBES, PROBES
from mergekit_wp.files.manifest import Fidelity, Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import table, words
from mergekit_wp.report.ranking import select
from mergekit_wp.scoring import sweeps
from mergekit_wp.scoring.blocks import second_order
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.factory import make_score_file
from tests.models import DEVICE, EOS, LETTERS, finetuned, make_model, perturbed, save, write_prompts
from tests.oracle import Sequences, layers_of, swapped, values
from tests.test_scoring import Quiet, partition_of

torch.set_num_threads(1)


def run(folder: Path, base: PreTrainedModel, expert: PreTrainedModel, **options) -> ScoreFile:
    """Neurons, estimated unless a budget says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    request = ScoreRequest(
        base=str(save(base, folder / "base")),
        expert=str(save(expert, folder / "expert")),
        out=folder / "scores.safetensors",
        **{
            "dtype": "float64",
            "device": DEVICE,
            "kinds": ("neuron",),
            "exact_budget": -1.0,
            **options,
        },
    )
    return score(request, Quiet())


def sequences_of(prompts: Path) -> Sequences:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    ids = [[list(map(LETTERS.index, row[part])) for part in ("prompt", "response")] for row in rows]
    return [(prompt, [*response, EOS]) for prompt, response in ids]


@torch.no_grad()
def half_the_variance(
    base: PreTrainedModel, other: PreTrainedModel, layer: int, sequences: Sequences
) -> float:
    """Half the variance of what an MLP's change does to log-probabilities, by finite differences.

    ``other`` has another MLP in this layer; its change is what it writes there on the base's input.
    """
    mlp, found = layers_of(base)[layer].mlp, []
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response])
        entering: list[torch.Tensor] = []
        handle = mlp.register_forward_pre_hook(
            lambda _m, args, entering=entering: entering.append(args[0])
        )
        places = slice(len(prompt) - 1, -1)
        own = base(ids).logits[0].log_softmax(-1)[places]
        handle.remove()
        change = layers_of(other)[layer].mlp(entering[0]) - mlp(entering[0])
        ends = []
        for step in (1e-4, -1e-4):
            handle = mlp.register_forward_hook(
                lambda _m, _a, out, step=step, change=change: out + step * change
            )
            ends.append(base(ids).logits[0].log_softmax(-1)[places])
            handle.remove()
        slope = (ends[0] - ends[1]) / 2e-4
        found.append((own.exp() * slope.square()).sum(-1).mean() / 2)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("criterion", ["kl", "logprob"])
def test_the_second_order_is_half_the_variance(tmp_path, monkeypatch, criterion) -> None:
    monkeypatch.setattr("mergekit_wp.scoring.blocks.CORRECTING_PROBES", 400)
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 3, response=True)
    options = {"prompts": prompts, "estimand": ("gain",), "criterion": (criterion,), "verify": 0}
    first = run(tmp_path / "first", base, expert, curvature=False, **options)
    second = run(tmp_path / "second", base, expert, **options)
    key = f"gain/{criterion}/neuron"
    assert first.manifest.fidelity[key].method == "first-order"
    assert second.manifest.fidelity[key].method == "second-order"
    ours, theirs = base.double(), expert.double()
    sequences, partition = sequences_of(prompts), partition_of(ours, first)
    ends = [values(model, theirs, sequences, None)[criterion].mean() for model in (ours, theirs)]
    for layer in range(first.manifest.n_layers):
        for index in (0, 3):
            component = Component("neuron", layer, index, "")
            other = swapped(ours, theirs, partition, component)
            want = -half_the_variance(ours, other, layer, sequences) / float(ends[1] - ends[0])
            found = second.tensors[key] - first.tensors[key]
            assert float(found[layer, index]) == pytest.approx(want, rel=0.2), component


def test_what_is_swapped_is_exact_and_the_others_are_bounded(tmp_path) -> None:
    base = make_model("llama-tied")
    prompts = write_prompts(tmp_path / "p.jsonl", 8, response=True)
    expert = finetuned(base, prompts)
    options = {"prompts": prompts, "estimand": ("gain",), "criterion": ("logprob",)}
    exact = run(tmp_path / "exact", base, expert, **options, exact_budget=1e9)
    plain = run(tmp_path / "plain", base, expert, **options, verify=0)
    first = run(tmp_path / "first", base, expert, **options, verify=0, curvature=False)
    found = run(tmp_path / "found", base, expert, **options, verify=4)
    key = "gain/logprob/neuron"
    truth, estimate, gradient, scores = (
        file.tensors[key].flatten() for file in (exact, plain, first, found)
    )
    stated = found.manifest.fidelity[key]
    at = list(stated.swapped)
    sizes = gradient.abs() + (estimate - gradient).abs()
    assert set(sizes.topk(4).indices.tolist()) <= set(at)
    if stated.method == "first-order":
        assert (truth - gradient)[at].abs().sum() < (truth - estimate)[at].abs().sum()
        estimate = gradient
    assert 4 <= len(at) <= 8
    for end in ("", ".se"):
        whole, parts = exact.tensors[f"{key}{end}"], found.tensors[f"{key}{end}"]
        torch.testing.assert_close(parts.flatten()[at], whole.flatten()[at], atol=1e-9, rtol=1e-5)
    others = torch.ones(len(truth), dtype=torch.bool)
    others[at] = False
    assert torch.equal(scores[others], estimate[others])
    error = float((truth - estimate)[at].abs().max())
    assert stated.largest_error == pytest.approx(error, rel=1e-4)
    assert stated.bound == pytest.approx(float(estimate[others].abs().max()) + error, rel=1e-4)
    assert float(truth[others].abs().max()) <= stated.bound
    assert "bound" not in plain.manifest.fidelity[key].model_dump_json()
    assert "others nothing larger than" in words.fidelity_words(stated)
    lines = "\n".join(table.render(found, select(found), 99)).splitlines()
    assert sum("~" in line for line in lines if " neuron " in line) == len(truth) - len(at)
    assert not any("~" in line for line in table.render(plain, select(plain), 99))


def test_first_and_second_order_that_cancel_are_swapped(tmp_path, monkeypatch) -> None:
    """An estimate of nothing, made of two large numbers, is the least to be trusted."""
    original = sweeps.measure

    def cancelling(block, recordings, at_once):
        found = original(block, recordings, at_once)
        if block.sweep == "first-order":
            found["logprob/neuron"][0, :, 0] = 0.0
            found["logprob/neuron/curvature"][0, :, 0] = -100.0
        return found

    monkeypatch.setattr(sweeps, "measure", cancelling)
    base = make_model("llama-tied")
    prompts = write_prompts(tmp_path / "p.jsonl", 2, response=True)
    options = {"prompts": prompts, "estimand": ("gain",), "criterion": ("logprob",), "verify": 1}
    found = run(tmp_path, base, perturbed(base), **options)
    assert 0 in found.manifest.fidelity["gain/logprob/neuron"].swapped


def test_the_anchor_stays_first_order(tmp_path) -> None:
    """The anchor is linear in what it reads: nothing there is of second order."""
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 4, contrast=True)
    options = {
        "prompts": prompts,
        "estimand": ("gain", "knockout"),
        "criterion": ("kl", "anchor"),
        "anchor_layer": 0,
        "max_new_tokens": 3,
    }
    found = run(tmp_path / "found", base, expert, **options, verify=2)
    for estimand in ("gain", "knockout"):
        methods = {
            c: found.manifest.fidelity[f"{estimand}/{c}/neuron"].method for c in ("kl", "anchor")
        }
        assert methods == {"kl": "second-order", "anchor": "first-order"}
    # the choice by the swaps would hide a second order of the anchor that does not belong there
    assert second_order(("anchor", "kl", "logprob"), "gain", True) == (
        ("kl", "logprob"),
        CORRECTING_PROBES,
    )
    assert second_order(("anchor", "kl"), "knockout", False) == (("kl",), PROBES)
    assert second_order(("anchor", "kl"), "gain", False) == ((), 0)


def test_a_swapped_place_that_is_none_is_refused() -> None:
    manifest = make_score_file(estimands=("gain",), criteria=("kl",)).manifest
    said = manifest.model_dump()
    said["fidelity"]["gain/kl/head"] = {"method": "first-order", "swapped": [0, 10**6]}
    with pytest.raises(
        ValueError, match="fidelity of 'gain/kl/head': a swapped place is not below"
    ):
        Manifest.model_validate(said)


def test_nothing_is_said_of_others_where_there_are_none() -> None:
    every = Fidelity(method="second-order", verified_top=8, pearson=0.9, largest_error=0.1)
    assert words.fidelity_words(every).endswith("Pearson 0.900")
