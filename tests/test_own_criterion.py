"""A caller's own criterion: any function of (logits, batch), exact against naive swapping."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from benchmarks.components import Component, components, fine_components, slices
from mergekit_wp import criteria
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.criteria import Targets
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.mechanism.request import VerifyRequest
from mergekit_wp.mechanism.verify import verify
from mergekit_wp.prompts import PromptBatch, Sample
from mergekit_wp.report.ranking import Selection, select
from mergekit_wp.report.table import render
from mergekit_wp.runs.cluster import moved
from mergekit_wp.runs.recordings import Portion, Recordings
from mergekit_wp.terms import KINDS
from tests.factory import make_score_file
from tests.merging import Family, by_mergekit, llama_config, reference
from tests.models import EXACT, make_model, perturbed, write_prompts
from tests.oracle import Sequences, swapped
from tests.test_scoring import Quiet, double_precision_file, partition_of, run, sequences_of

torch.set_num_threads(1)
ensure_registered()
__all__ = ["double_precision_file"]

BATCH = PromptBatch.of([Sample((1, 2), (3, 4))], [0], "cpu")
SMALL = {"max_new_tokens": 3, "batch_size": 7, "share_steps": 1}


def margin(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """How far the first response token stands above token 3, squared over its whole response."""
    ahead = logits.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) - logits[:, 3]
    squares = torch.zeros(batch.size, dtype=logits.dtype, device=logits.device)
    return squares.index_add(0, batch.owners, ahead * ahead.abs())


@torch.no_grad()
def naive(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """The same, one prompt at a time, mean over prompts."""
    return torch.stack([one(model, *pair) for pair in sequences]).mean()


def one(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    ahead = logits[range(len(response)), response] - logits[:, 3]
    return (ahead * ahead.abs()).sum()


def at(scores: torch.Tensor, component: Component) -> float:
    place = (component.layer, component.index) if scores.dim() == 2 else component.index
    return float(scores[place])


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_gains_and_knockouts_equal_naive_swapping(tmp_path, family, double_precision_file) -> None:
    base = make_model(family)
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=("gain", "knockout"),
        criterion=("kl", margin),
        **SMALL,
    )
    (exact,) = double_precision_file
    assert result.manifest.criteria == ("kl", "margin")
    assert result.manifest.noise_floor["margin"] < 1e-12
    partition, sequences = partition_of(base, result), sequences_of(prompts, expert, 3)
    low, high = naive(base, sequences), naive(expert, sequences)
    scale = result.manifest.scale["margin"]
    assert (scale.base, scale.expert) == pytest.approx((float(low), float(high)), abs=1e-9)
    for estimand, pair in (("gain", (base, expert)), ("knockout", (expert, base))):
        for kind in result.manifest.kinds:
            for component in components(partition, kind):
                model = swapped(*pair, partition, component)
                r = float((naive(model, sequences) - low) / (high - low))
                want = r if estimand == "gain" else 1 - r
                found = at(exact[f"{estimand}/margin/{kind}"], component)
                assert found == pytest.approx(want, abs=EXACT), component


def test_shares_equal_autograd_and_first_order_its_linear_part(
    tmp_path, double_precision_file
) -> None:
    base = make_model("qwen2")
    expert = perturbed(base, 1e-4)  # so little that swaps are linear
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=("share", "gain", "knockout"),
        criterion=(margin,),
        exact_budget=0,
        verify=4,
        **SMALL,
    )
    (scores,) = double_precision_file
    partition, sequences = partition_of(base, result), sequences_of(prompts, expert, 3)
    span = naive(expert, sequences) - naive(base, sequences)
    halfway = copy.deepcopy(base).requires_grad_(True)
    theirs, ours = dict(expert.named_parameters()), dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in halfway.named_parameters():
            parameter.copy_((ours[name] + theirs[name]) / 2)
    torch.stack([one(halfway, *pair) for pair in sequences]).mean().backward()
    for component in fine_components(partition):
        want = sum(
            float(
                (halfway.get_parameter(name).grad * (theirs[name] - ours[name]))[index]
                .detach()
                .sum()
            )
            for name, index in slices(partition, component).items()
        ) / float(span)
        found = at(scores[f"share/margin/{component.kind}"], component)
        assert found == pytest.approx(want, abs=1e-6), component  # norms compute in float32
    assert result.manifest.completeness["share/margin"] == pytest.approx(1, abs=1e-3)
    for estimand in ("gain", "knockout"):
        for kind in ("head", "kv_group", "neuron"):
            fidelity = result.manifest.fidelity[f"{estimand}/margin/{kind}"]
            assert fidelity.method == "first-order"
            assert fidelity.verified_top + fidelity.verified_random >= 4
            assert fidelity.pearson > 0.9999


def test_memory_backoff_and_batches_change_nothing(tmp_path, monkeypatch) -> None:
    base = make_model("llama-tied")
    options = {
        "prompts": write_prompts(tmp_path / "p.jsonl", 5),
        "criterion": (margin,),
        "max_new_tokens": 3,
    }
    whole = run(tmp_path / "whole", base, perturbed(base), batch_size=5, **options)
    single = run(tmp_path / "single", base, perturbed(base), batch_size=1, **options)
    original = Recordings.prompts
    refused = []

    def short_of_memory(recordings: Recordings, portion: Portion) -> tuple[PromptBatch, Targets]:
        if portion.stop - portion.start > 2:
            refused.append(portion)
            raise MemoryError
        return original(recordings, portion)

    monkeypatch.setattr(Recordings, "prompts", short_of_memory)
    halved = run(tmp_path / "halved", base, perturbed(base), batch_size=5, **options)
    assert refused
    for key in whole.manifest.score_keys():
        for other in (single, halved):
            torch.testing.assert_close(other.tensors[key], whole.tensors[key], atol=1e-6, rtol=0)


def test_the_file_is_read_shown_and_made_by_no_command(tmp_path) -> None:
    base = make_model("llama-tied")
    result = run(tmp_path, base, perturbed(base), criterion=(margin, "kl"), estimand=("gain",))
    read = scorefile.read(tmp_path / "scores.safetensors")
    assert read.manifest == result.manifest
    assert read.manifest.command == ()
    assert select(read).criteria == ("kl", "margin")
    shown = table(read, select(read))
    assert "margin what the caller's function margin says" in shown


def test_verify_takes_its_sets_and_measures_them_by_the_others(tmp_path) -> None:
    base = make_model("llama-tied")
    prompts = write_prompts(tmp_path / "p.jsonl", 3, response=True)
    run(tmp_path, base, perturbed(base), criterion=(margin,), estimand=("gain",), prompts=prompts)
    file, told = tmp_path / "scores.safetensors", Quiet()
    found = verify(VerifyRequest(file=file, prompts=prompts, top=("2",)), None, told)
    assert found.criterion == "margin" and {point.measure for point in found.points} == {"kl"}
    assert "no curve by 'margin': a caller's function is not in its file" in told.notes


def test_a_recipe_may_merge_by_it(tmp_path) -> None:
    family = Family.make(tmp_path, llama_config(), criteria=("kl", "margin"))
    recipe = family.recipe(parameters={"criterion": "margin"})
    merged = by_mergekit(recipe, tmp_path / "out")
    states = [expert.state for expert in family.experts]
    wanted = reference(family.base.state, states, family.files, criterion="margin")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="'share/mine' scores, it has share/kl, share/margin"):
        by_mergekit(family.recipe(parameters={"criterion": "mine"}), tmp_path / "other")
    with pytest.raises(UserError, match="'criterion' must be one of kl, anchor, logprob, or the"):
        by_mergekit(family.recipe(parameters={"criterion": "no name"}), tmp_path / "other")


def top1(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    right = (logits.argmax(-1) == batch.targets).to(logits.dtype)
    return criteria.per_prompt_mean(right, batch)


def test_what_has_no_gradient_is_swapped_exactly_and_nothing_else(tmp_path) -> None:
    base = make_model("llama-tied")
    options = {"criterion": (top1,), "max_new_tokens": 3}
    result = run(tmp_path, base, perturbed(base, 0.3), estimand=("gain",), **options)
    assert result.manifest.fidelity["gain/top1/head"].method == "exact"
    for estimand in ("share", "gain"):
        with pytest.raises(UserError, match="criterion 'top1' has no gradient, which shares and"):
            run(
                tmp_path / estimand,
                base,
                perturbed(base, 0.3),
                estimand=(estimand,),
                exact_budget=0,
                **options,
            )


def table(file: scorefile.ScoreFile, selection: Selection) -> str:
    return " ".join(" ".join(render(file, selection, 3)).split())


def _refused(name: str, function) -> object:
    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda logits, batch: logits[:, 0], "criterion <lambda>: files .* define it with 'def'"),
        (partial(margin), "define it with 'def'"),
        (_refused("größe", lambda x, b: x), "criterion größe: files and recipes know a function"),
        (_refused("a" * 65, lambda x, b: x), "at most 64 letters, digits and underscores"),
        (_refused("kl", lambda x, b: x), "criterion 'kl' is the name of another; rename"),
        (_refused("behavior", lambda x, b: x), "'behavior' is the name of another"),
        (_refused("mine", lambda x, b: x[:, 0]), r"'mine' returned \[\d+\]; expected one"),
        (_refused("mine", lambda x, b: 1.0), "criterion 'mine' returned no tensor; expected one"),
        (
            _refused("mine", lambda x, b: x.new_full((b.size,), torch.nan)),
            "criterion 'mine' returned torch.float64 values that are not all finite",
        ),
        (
            _refused("mine", lambda x, b: torch.ones(b.size, dtype=torch.long)),
            "criterion 'mine' returned torch.int64 values",
        ),
        (
            _refused("mine", lambda x, b: x.new_ones(b.size)),
            "criterion 'mine' does not separate base from expert",
        ),
    ],
)
def test_a_function_that_is_no_criterion_is_refused(tmp_path, function, why) -> None:
    base = make_model("llama-tied")
    with pytest.raises(UserError, match=why):
        run(tmp_path, base, perturbed(base), criterion=(function,), estimand=("gain",))
    assert not (tmp_path / "scores.safetensors").exists()


def test_it_goes_to_the_workers_of_a_cluster() -> None:
    """Ray pickles by value what pickle cannot."""
    sent = pickle.dumps(moved(criteria.Targets(functions={"margin": margin}), "cpu"))
    assert pickle.loads(sent).functions == {"margin": margin}


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="criterion 'margin' is given twice"):
        criteria.named((margin, _refused("margin", lambda x, b: x)))


def test_a_resumed_run_refuses_another_function_of_the_same_name(tmp_path, monkeypatch) -> None:
    base = make_model("llama-tied")

    def stop(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("mergekit_wp.scoring.score.write", stop)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, base, perturbed(base), criterion=(margin,), estimand=("gain",))

    def other(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
        return -margin(logits, batch)

    with pytest.raises(UserError, match=r"inputs; changed: criterion \(\['margin "):
        run(
            tmp_path,
            base,
            perturbed(base),
            criterion=(_refused("margin", other),),
            estimand=("gain",),
        )


def test_where_the_function_is_not_at_hand_it_is_said() -> None:
    with pytest.raises(UserError, match="'margin' is a caller's function, which is not at hand"):
        criteria.logit_values(torch.zeros(2, 5), BATCH, ("margin",), criteria.Targets())


# --- files of strangers -------------------------------------------------------------------------


def with_criteria(path: Path, names: list[str]) -> None:
    """Another name in a file's manifest and tensors for ``kl``."""
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        manifest = json.loads(handle.metadata()["mergekit_wp"])
    for field in ("scale", "noise_floor"):
        manifest[field] = dict.fromkeys(names, manifest[field]["kl"])
    manifest["criteria"] = names
    tensors = {
        key.replace("/kl/", f"/{name}/"): value.clone()
        for key, value in tensors.items()
        for name in (names if "/kl/" in key else ["kl"])
    }
    save_file(tensors, path, metadata={"mergekit_wp": json.dumps(manifest)})


@pytest.mark.parametrize("name", ["my_own", "_", "a" * 64])
def test_a_criterion_of_any_name_is_read(tmp_path, name) -> None:
    path = tmp_path / "s.safetensors"
    scorefile.write(make_score_file(), path)
    with_criteria(path, [name])
    file = scorefile.read(path)
    assert file.manifest.criteria == (name,)
    assert name in table(file, select(file, criterion=name))


@pytest.mark.parametrize(
    "name", ["", "a" * 65, "1a", "a b", "a/b", "../x", "<b>", "a\n", "größe", "\x1b[31m", "a.se"]
)
def test_a_name_that_is_no_identifier_is_refused(tmp_path, name) -> None:
    path = tmp_path / "s.safetensors"
    scorefile.write(make_score_file(), path)
    with_criteria(path, [name])
    with pytest.raises(UserError, match="bad manifest: criteria.0: String should match pattern"):
        scorefile.read(path)


def test_a_file_of_a_thousand_criteria_is_refused(tmp_path) -> None:
    path = tmp_path / "s.safetensors"
    scorefile.write(make_score_file(), path)
    with_criteria(path, [f"c{i}" for i in range(65)])
    with pytest.raises(UserError, match="criteria: Tuple should have at most 64 items"):
        scorefile.read(path)


# --- a new built-in criterion -------------------------------------------------------------------


def test_an_output_criterion_is_one_entry_of_the_table(tmp_path, monkeypatch) -> None:
    """With its name in `terms.BuiltInCriterion`, which only requests read."""

    def certainty(
        logits: torch.Tensor, batch: PromptBatch, targets: criteria.Targets
    ) -> torch.Tensor:
        logprobs = torch.log_softmax(criteria.wide(logits), -1)
        assert targets.expert_logprobs is not None
        return criteria.per_prompt_mean((logprobs.exp() * logprobs).sum(-1), batch)

    entry = criteria.Criterion("certainty of the response", certainty, needs_expert=True)
    monkeypatch.setitem(criteria.OUTPUT, "certainty", entry)
    base = make_model("llama-tied")
    monkeypatch.setattr("mergekit_wp.scoring.score.choose_criteria", lambda *_: ("certainty",))
    result = run(tmp_path, base, perturbed(base))
    for kind in KINDS:
        assert torch.isfinite(result.scores("share", "certainty", kind)).all()
    assert result.manifest.completeness["share/certainty"] == pytest.approx(1, abs=0.2)
    assert "certainty of the response" in table(result, select(result))
