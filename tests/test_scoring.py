"""Scores against naive weight swapping in float64, through the public scoring function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.components import components, slices
from mergekit_wp.components import Partition
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score, score_tensors
from mergekit_wp.terms import KINDS
from tests.models import (
    DEVICE,
    EOS,
    EXACT,
    LETTERS,
    finetuned,
    make_model,
    perturbed,
    save,
    write_prompts,
)
from tests.oracle import Naive, greedy, swapped, values

torch.set_num_threads(1)


class Quiet:
    """A progress that says nothing but remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[tuple[str, float]] = []
        self.done = 0.0

    def stage(self, name: str, total: float, unit: str) -> None:
        self.stages.append((name, total))

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        self.notes.append(text)

    def plan(self, opened: object) -> None:
        self.opened = opened


def ids_of(prompts: Path) -> list[list[int]]:
    return [
        [LETTERS.index(letter) for letter in json.loads(line)["prompt"]]
        for line in prompts.read_text().splitlines()
    ]


def sequences_of(
    prompts: Path, expert: PreTrainedModel, n: int
) -> list[tuple[list[int], list[int]]]:
    return [(ids, greedy(expert, ids, n, EOS)) for ids in ids_of(prompts)]


def partition_of(model: PreTrainedModel, result: ScoreFile) -> Partition:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Partition(result.manifest.dims, shapes)


def run(tmp_path: Path, base: PreTrainedModel, expert: PreTrainedModel, **options) -> ScoreFile:
    tmp_path.mkdir(exist_ok=True)
    prompts = options.pop("prompts", None) or write_prompts(tmp_path / "prompts.jsonl")
    request = ScoreRequest(
        base=str(save(base, tmp_path / "base")),
        expert=str(save(expert, tmp_path / "expert")),
        prompts=prompts,
        out=tmp_path / "scores.safetensors",
        **{"dtype": "float64", "device": DEVICE, "max_new_tokens": 4, **options},
    )
    return score(request, Quiet())


@pytest.fixture
def double_precision_file(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The scores before they are rounded to the file's float32."""
    kept: list[dict[str, torch.Tensor]] = []
    original = score_tensors

    def keep(sweep):
        kept.append(
            {
                f"{e}/{c}/{k}": sweep.scores(e, c, k)[0]
                for e, c, k in sweep.changes
                if k in sweep.request.kinds
            }
        )
        anchor = sweep.recordings.references.targets[0].anchor
        if anchor is not None:
            kept[0]["anchor"] = anchor.vector.cpu()
        return original(sweep)

    monkeypatch.setattr("mergekit_wp.scoring.score.score_tensors", keep)
    return kept


@pytest.mark.parametrize("patched", ["", "activation_"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("llama-tied", "mistral", "qwen2", "qwen3")
        ),
    ],
)
def test_exact_scores_equal_naive_patching(
    tmp_path, family, patched, double_precision_file
) -> None:
    base = make_model(family)
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 4, contrast=family == "qwen2")
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=(f"{patched}gain", f"{patched}knockout"),
        criterion=("kl", "anchor", "logprob"),
        batch_size=7,  # two prompts' batches of unequal length, several patches each
        anchor_layer=None if family == "llama" else 0,
    )
    (exact,) = double_precision_file
    assert all(f.method == "exact" for f in result.manifest.fidelity.values())
    anchor = (result.manifest.anchor.layer, exact["anchor"])
    partition = partition_of(base, result)
    naive = Naive(base, expert, partition, sequences_of(prompts, expert, 4), anchor)
    for estimand in (f"{patched}gain", f"{patched}knockout"):
        for kind in KINDS:
            for component in components(partition, kind):
                for criterion, value in naive.score(estimand, component).items():
                    scores = exact[f"{estimand}/{criterion}/{kind}"]
                    place = (
                        (component.layer, component.index) if scores.dim() == 2 else component.index
                    )
                    assert float(scores[place]) == pytest.approx(value, abs=EXACT), component


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_shares_sum_to_one_and_tensors_add_up(tmp_path, family) -> None:
    base = make_model(family)
    result = run(
        tmp_path,
        base,
        perturbed(base, 0.03),
        criterion=("kl", "anchor", "logprob"),
        estimand=("share",),
    )
    partition = partition_of(base, result)
    for criterion in ("kl", "anchor", "logprob"):
        fine = result.fine_scores("share", criterion)
        total = sum(float(scores.double().sum()) for scores in fine.values())
        assert total == pytest.approx(1.0, abs=0.02)
        assert result.manifest.completeness[f"share/{criterion}"] == pytest.approx(total, abs=1e-5)
        tensors = result.scores("share", criterion, "tensor")
        for layer in range(2):  # two ways to cut the same weights must agree
            names = partition.layer_tensors(layer)
            places = [partition.tensor_names.index(name) for name in names]
            whole = float(tensors[places].sum())
            assert float(result.scores("share", criterion, "layer")[layer]) == pytest.approx(
                whole, abs=1e-5
            )
            parts = sum(
                float(fine[kind][layer].sum()) for kind in ("head", "kv_group", "neuron")
            ) + sum(
                float(tensors[partition.tensor_names.index(n)])
                for n in names
                if n in partition.whole_tensors
            )
            assert parts == pytest.approx(whole, abs=1e-5)


def test_share_equals_weight_gradient_dot_delta(tmp_path) -> None:
    """One midpoint step against autograd on the weights themselves."""
    base = make_model("qwen2")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 3, response=True)
    result = run(
        tmp_path, base, expert, prompts=prompts, share_steps=1, estimand=("share",), batch_size=2
    )
    halfway = perturbed(base, 0.0)
    halfway.requires_grad_(True)
    with torch.no_grad():
        for half, b, e in zip(
            halfway.parameters(), base.parameters(), expert.parameters(), strict=True
        ):
            half.copy_((b + e) / 2)
    total_kl, base_kl = torch.zeros(()), torch.zeros(())
    for line in prompts.read_text().splitlines():
        item = json.loads(line)
        ids = [LETTERS.index(x) for x in item["prompt"]]
        response = [LETTERS.index(x) for x in item["response"]] + [EOS]
        at = slice(len(ids) - 1, -1)
        x = torch.tensor([ids + response])
        target = expert(x).logits[0, at].log_softmax(-1).detach()
        for model in (halfway, base):
            logprobs = model(x).logits[0, at].log_softmax(-1)
            kl = (target.exp() * (target - logprobs)).sum(-1).mean()
            if model is halfway:
                total_kl = total_kl + kl
            else:
                base_kl = base_kl + kl.detach()
    (total_kl / base_kl).backward()
    partition = partition_of(base, result)
    theirs, ours = dict(expert.named_parameters()), dict(base.named_parameters())
    product = {
        name: -(p.grad * (theirs[name] - ours[name])) for name, p in halfway.named_parameters()
    }
    for kind in KINDS:
        scores = result.scores("share", "kl", kind)
        for component in components(partition, kind):
            want = sum(
                float(product[name][index].detach().sum())
                for name, index in slices(partition, component).items()
            )
            place = (component.layer, component.index) if scores.dim() == 2 else component.index
            assert float(scores[place]) == pytest.approx(want, abs=1e-6), component


def test_gain_of_a_single_component_expert_is_one(tmp_path) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base, 0.0)
    with torch.no_grad():
        mlp = expert.model.layers[1].mlp
        mlp.gate_proj.weight[2] += 1
        mlp.up_proj.weight[2] -= 1
        mlp.down_proj.weight[:, 2] += 1
    result = run(tmp_path, base, expert, estimand=("gain", "knockout"))
    for estimand in ("gain", "knockout"):
        neuron = result.scores(estimand, "kl", "neuron")
        assert float(neuron[1, 2]) == pytest.approx(1, abs=1e-6)
        assert float(result.scores(estimand, "kl", "layer")[1]) == pytest.approx(1, abs=1e-6)
        neuron[1, 2] = 0
        assert not neuron.any(), "components in which the two do not differ score exactly zero"
        assert not result.scores(estimand, "kl", "head").any()


def planted(seed: int) -> tuple[PreTrainedModel, PreTrainedModel, set[tuple[str, int, int]]]:
    """A base, and an expert that differs in three neurons and a head; elsewhere by small noise."""
    base = make_model("llama-tied", seed)
    expert = perturbed(base, 0.0002, seed + 1000)
    generator = torch.Generator().manual_seed(seed)
    places: set[tuple[str, int, int]] = set()
    dims = {"neuron": 6, "head": 4}
    while len(places) < 4:
        kind = "head" if len(places) == 3 else "neuron"
        layer = int(torch.randint(2, (), generator=generator))
        places.add((kind, layer, int(torch.randint(dims[kind], (), generator=generator))))
    with torch.no_grad():
        for kind, layer, i in sorted(places):
            block = expert.model.layers[layer]
            if kind == "neuron":
                rows = [block.mlp.gate_proj.weight[i], block.mlp.up_proj.weight[i]]
                rows.append(block.mlp.down_proj.weight[:, i])
            else:
                cut = slice(4 * i, 4 * i + 4)
                rows = [block.self_attn.q_proj.weight[cut], block.self_attn.o_proj.weight[:, cut]]
            for row in rows:
                row.add_(torch.randn(row.shape, generator=generator, dtype=row.dtype))
    return base, expert, places


@pytest.mark.parametrize("method", ["exact", pytest.param("second-order", marks=pytest.mark.slow)])
def test_planted_components_lead_the_ranking(tmp_path, method) -> None:
    for seed in range(20):
        base, expert, places = planted(seed)
        result = run(
            tmp_path / str(seed),
            base,
            expert,
            prompts=write_prompts(tmp_path / "p.jsonl", 8, response=True),
            estimand=("gain",),
            kinds=("head", "kv_group", "neuron"),
            exact_budget=1e9 if method == "exact" else 0.0,
            verify=0,
        )
        assert {f.method for f in result.manifest.fidelity.values()} == {method}
        ranked = sorted(
            (
                (abs(float(score)), (kind, layer, i))
                for kind in ("head", "kv_group", "neuron")
                for layer, row in enumerate(result.scores("gain", "kl", kind))
                for i, score in enumerate(row)
            ),
            reverse=True,
        )
        assert {place for _, place in ranked[:4]} == places, seed


def test_where_the_input_is_the_same_both_patches_are(tmp_path) -> None:
    """Only the first layer's MLP differs: below it nothing moves, in it the input is the base's."""
    base = make_model("mistral")
    expert = perturbed(base, 0.0)
    mlp = expert.model.layers[0].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.add_(0.2 * torch.randn_like(linear.weight))
    result = run(tmp_path, base, expert, estimand=("gain", "knockout", "activation_gain"), verify=0)
    weights, activations = (result.scores(e, "kl", "neuron") for e in ("gain", "activation_gain"))
    assert activations[0].tolist() == pytest.approx(weights[0].tolist(), abs=1e-6)
    assert not result.scores("activation_gain", "kl", "head")[0].any()
    assert not weights[1].any() and not result.scores("gain", "kl", "head")[1].any()
    assert activations[1].abs().min() > 1e-4, "the second layer passes on what the first supplies"
    assert result.scores("activation_gain", "kl", "head")[1].abs().min() > 1e-6


@pytest.mark.parametrize(
    ("estimand", "least"),
    [
        ("gain", 0.98),
        ("knockout", 0.85),
        ("activation_gain", 0.7),  # larger changes than those of a swap
        ("activation_knockout", 0.8),
    ],
)
def test_estimates_predict_exact_and_say_how_well(tmp_path, estimand, least) -> None:
    base = make_model("llama-tied")
    prompts = write_prompts(tmp_path / "p.jsonl", 16, response=True)
    expert = finetuned(base, prompts)
    options = {"prompts": prompts, "estimand": (estimand,), "criterion": ("kl",)}
    exact = run(tmp_path / "exact", base, expert, exact_budget=1e9, **options)
    plain = {
        method: run(tmp_path / method, base, expert, exact_budget=0.0, verify=0, **options, **how)
        for method, how in (("first-order", {"curvature": False}), ("second-order", {}))
    }
    first = run(tmp_path / "first", base, expert, exact_budget=0.0, verify=8, **options)
    for kind in ("head", "neuron"):
        truth = exact.scores(estimand, "kl", kind).flatten()
        fidelity = first.manifest.fidelity[f"{estimand}/kl/{kind}"]
        guesses = {m: f.scores(estimand, "kl", kind).flatten() for m, f in plain.items()}
        guess = guesses[fidelity.method]
        agreement = float(torch.corrcoef(torch.stack([truth, guess]))[0, 1])
        assert agreement > least
        swapped = list(fidelity.swapped)
        errors = {m: float((truth - g)[swapped].abs().sum()) for m, g in guesses.items()}
        # the gradient of KL vanishes at the expert, where knockouts are measured
        if not estimand.endswith("knockout"):
            assert fidelity.method == min(errors, key=errors.get)
        else:
            assert fidelity.method == "second-order"
        assert fidelity.verified_top == fidelity.verified_random == 8
        if kind == "head":  # all eight were verified, so the statement is the whole truth
            assert fidelity.pearson == pytest.approx(agreement, abs=1e-3)
            assert fidelity.largest_missed is None
        else:
            sizes = truth[swapped].abs()
            assert float((sizes - fidelity.largest_missed).abs().min()) < 1e-6


def test_a_prompts_numbers_do_not_depend_on_its_batch(tmp_path) -> None:
    base = make_model("mistral")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 5, contrast=True)
    options = {
        "prompts": prompts,
        "estimand": ("share", "gain", "knockout"),
        "criterion": ("kl", "anchor", "logprob"),
        "anchor_layer": 1,
        "exact_budget": 8.0,  # so that first- and second-order scores are among them
        "verify": 2,
    }
    alone = run(tmp_path / "alone", base, expert, batch_size=1, **options)
    together = run(tmp_path / "together", base, expert, batch_size=64, **options)
    for key, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[key], tensor, rtol=1e-5, atol=1e-8)


def test_standard_errors_are_those_of_a_ratio_of_means(tmp_path) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    result = run(tmp_path, base, expert, prompts=prompts, estimand=("gain",), criterion=("kl",))
    sequences = sequences_of(prompts, expert, 4)
    partition = partition_of(base, result)
    component = next(components(partition, "layer"))
    kl = values(swapped(base, expert, partition, component), expert, sequences, None)["kl"]
    at_base = values(base, expert, sequences, None)["kl"]
    change, distance = kl - at_base, -at_base
    residual = change - change.mean() / distance.mean() * distance
    want = residual.square().sum().div(6 * 5).sqrt() / distance.mean()
    assert float(result.tensors["gain/kl/layer.se"][0]) == pytest.approx(float(want), rel=1e-5)


def test_noise_floor_and_scale_are_written(tmp_path) -> None:
    base = make_model("llama-tied")
    result = run(tmp_path, base, perturbed(base), dtype="float32")
    assert 0 < result.manifest.noise_floor["kl"] < 1e-4
    assert result.manifest.scale["kl"].expert == 0 > result.manifest.scale["kl"].base


def test_anchor_contrasts(tmp_path) -> None:
    base = make_model("llama-tied")
    expert = perturbed(base)
    with_contrast = write_prompts(tmp_path / "c.jsonl", 6, contrast=True)
    result = run(tmp_path / "i", base, expert, prompts=with_contrast)
    assert result.manifest.criteria == ("kl", "anchor"), "contrasts bring the anchor in"
    assert result.manifest.anchor.contrast == "instruction"
    assert result.manifest.anchor.n_contrasts == 6
    plain = run(tmp_path / "m", base, expert, criterion=("anchor",))
    assert plain.manifest.anchor.contrast == "checkpoint"
    assert plain.manifest.scale["anchor"].expert > plain.manifest.scale["anchor"].base
    assert float(plain.tensors["anchor/vector"].norm()) == pytest.approx(1, abs=1e-6)


def test_progress_reaches_its_total_and_no_end_token_is_no_trouble(tmp_path) -> None:
    base = make_model("llama-tied")
    for name, model in (("base", base), ("expert", perturbed(base))):
        save(model, tmp_path / name)
        for config in ("tokenizer_config.json", "generation_config.json", "config.json"):
            path = tmp_path / name / config
            content = json.loads(path.read_text())
            content.pop("eos_token", None)
            content.pop("eos_token_id", None)
            path.write_text(json.dumps(content))
    progress = Quiet()
    request = ScoreRequest(
        base=str(tmp_path / "base"),
        expert=str(tmp_path / "expert"),
        prompts=write_prompts(tmp_path / "p.jsonl", 5),
        out=tmp_path / "s.safetensors",
        estimand=("share", "gain", "knockout"),
        batch_size=2,
        max_new_tokens=3,
        exact_budget=8.0,
        verify=2,
    )
    score(request, progress)
    assert {"share", "gain, exact", "gain, verifying", "knockout, first-order"} <= {
        name for name, _ in progress.stages
    }
    assert progress.done == pytest.approx(sum(total for _, total in progress.stages))
