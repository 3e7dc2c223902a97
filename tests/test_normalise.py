"""Scores that divide prompt by prompt, against naive swapping in float64."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.components import components
from mergekit_wp.criteria import SMALL_GAP, per_prompt
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import prompt_source
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import EOS, EXACT, LETTERS, make_model, perturbed, save
from tests.oracle import swapped, values
from tests.test_scoring import Quiet, double_precision_file, partition_of, run

torch.set_num_threads(1)
__all__ = ["double_precision_file"]


def with_a_small_gap(tmp_path, base, expert):
    """Four prompts of many, on one of which base and expert are nearly alike by logprob."""
    rng = torch.Generator().manual_seed(0)
    sequences = [
        (ids[:-1], [ids[-1], EOS])
        for ids in torch.randint(len(LETTERS), (300, 4), generator=rng).tolist()
    ]
    at_base, at_expert = (values(m, expert, sequences, None)["logprob"] for m in (base, expert))
    order = (at_expert - at_base).abs().argsort().tolist()
    chosen = [sequences[i] for i in (order[-2], order[0], order[len(order) // 2], order[-1])]
    rows = (("".join(LETTERS[i] for i in ids), LETTERS[answer]) for ids, (answer, _) in chosen)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    return path, chosen


def test_a_mean_of_quotients_equals_naive_swapping(tmp_path, double_precision_file) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts, sequences = with_a_small_gap(tmp_path, base, expert)
    options = {
        "prompts": prompts,
        "estimand": ("gain", "knockout", "share"),
        "criterion": ("kl", "logprob"),
        "kinds": ("head", "neuron"),
        "share_steps": 1,
    }
    result = run(tmp_path / "a", base, expert, normalise="prompt", **options)
    (found,) = double_precision_file
    assert result.manifest.left_out == {"kl": (), "logprob": (1,)}
    partition = partition_of(base, result)
    ends = [values(model, expert, sequences, None) for model in (base, expert)]
    for kind in ("head", "neuron"):
        for component in list(components(partition, kind))[::3]:
            for estimand, (receiver, donor) in {
                "gain": (base, expert),
                "knockout": (expert, base),
            }.items():
                patched = values(
                    swapped(receiver, donor, partition, component), expert, sequences, None
                )
                for criterion, kept in (("kl", [0, 1, 2, 3]), ("logprob", [0, 2, 3])):
                    quotients = []
                    for i in kept:
                        lower, upper = (float(end[criterion][i]) for end in ends)
                        quotients.append((float(patched[criterion][i]) - lower) / (upper - lower))
                    want = torch.tensor(quotients, dtype=torch.float64)
                    want = want if estimand == "gain" else 1 - want
                    place = (component.layer, component.index)
                    scores = found[f"{estimand}/{criterion}/{kind}"]
                    assert float(scores[place]) == pytest.approx(float(want.mean()), abs=EXACT)
                    error = result.tensors[f"{estimand}/{criterion}/{kind}.se"][place]
                    assert float(error) == pytest.approx(
                        float(want.std() / len(want) ** 0.5), rel=1e-4, abs=1e-9
                    )
    plain = run(tmp_path / "b", base, expert, **options)
    assert plain.manifest.left_out is None
    assert "left_out" not in plain.manifest.model_dump()
    differing = result.tensors["gain/logprob/head"] - plain.tensors["gain/logprob/head"]
    assert float(differing.abs().max()) > 1e-3


def test_shares_of_every_prompt_sum_to_one(tmp_path) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts, _ = with_a_small_gap(tmp_path, base, expert)
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=("share",),
        criterion=("kl",),
        share_steps=40,
        normalise="prompt",
    )
    assert result.manifest.completeness["share/kl"] == pytest.approx(1, abs=0.01)


def test_prompts_that_are_left_out_are_told(tmp_path) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts, _ = with_a_small_gap(tmp_path, base, expert)
    progress = Quiet()
    request = ScoreRequest(
        base=str(save(base, tmp_path / "base")),
        expert=str(save(expert, tmp_path / "expert")),
        prompts=prompts,
        estimand=("gain",),
        criterion=("logprob",),
        kinds=("layer",),
        dtype="float64",
        normalise="prompt",
    )
    score(request, progress)
    (note,) = [note for note in progress.notes if "by prompt" in note]
    assert note == (
        "'logprob' by prompt leaves 1 of 4 prompts out, 2: base and expert differ there by less "
        "than 5% of what they do on the mean"
    )


def test_the_gap_may_have_either_sign_and_is_held_against_the_mean() -> None:
    distance = torch.tensor([1.0, -1.0, 0.5 * SMALL_GAP, 1.0]).double()
    change, ones = per_prompt(torch.tensor([[0.5, -0.25, 7.0, 0.0]]).double(), distance)
    assert change.tolist() == [[0.5, 0.25, 0.0]]
    assert ones.tolist() == [1, 1, 1]


def test_another_way_to_normalise_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="normalise.*'mean' or 'prompt'"):
        ScoreRequest.of(
            base=str(tmp_path),
            expert=str(tmp_path),
            prompts=prompt_source(["a"]),
            normalise="median",
        )
