"""Every architecture against naive swapping, autograd and a merge by its definition."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from benchmarks.components import Component, components, fine_components, part_of, slices
from mergekit_wp.architectures import FAMILIES as DECLARED
from mergekit_wp.architectures import Dims
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.merging import EvaluationModel
from mergekit_wp.components import Partition
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.circuit import check_traceable
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.report.panels import tensor_grid
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.terms import KINDS
from tests.factory import make_score_file
from tests.joint_world import NAMES, make_world
from tests.merging import norms, reference
from tests.models import (
    CONFIGS,
    DEVICE,
    EXACT,
    FAMILIES,
    OTHERS,
    make_model,
    perturbed,
    save,
    save_tokenizer,
    tolerance,
    write_prompts,
)
from tests.oracle import Naive, Sequences, layers_of
from tests.test_scoring import Quiet, double_precision_file, partition_of, run, sequences_of

torch.set_num_threads(1)
ensure_registered()
__all__ = ["double_precision_file"]


def at(scores: torch.Tensor, component: Component) -> float:
    return float(
        scores[component.layer, component.index] if scores.dim() == 2 else scores[component.index]
    )


def test_every_declared_architecture_is_tested() -> None:
    tested = {(CONFIGS | FAMILIES)[name]().model_type for name in [*CONFIGS, *FAMILIES]}
    # one has a test of its own below
    assert tested | {"mistral3"} == {family.model_type for family in DECLARED}


def gradients_between(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    sequences: Sequences,
    anchor: torch.Tensor,
    criterion: str,
) -> dict[str, torch.Tensor]:
    """Weight gradient times delta half way from base to expert, by tensor name."""
    model = copy.deepcopy(base).requires_grad_(True)
    ours, theirs = dict(base.named_parameters()), dict(expert.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((ours[name] + theirs[name]) / 2)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, response in sequences:
        ids, states = torch.tensor([prompt + response]), []
        handle = layers_of(model)[0].register_forward_hook(
            lambda _m, _i, out, states=states: states.append(
                out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        where = slice(len(prompt) - 1, -1)
        logprobs = model(ids).logits[0].log_softmax(-1)[where]
        handle.remove()
        with torch.no_grad():
            target = expert(ids).logits[0].log_softmax(-1)[where]
        if criterion == "kl":
            total = total - (target.exp() * (target - logprobs)).sum(-1).mean()
        else:
            total = total + states[0][0, len(prompt) - 1] @ anchor
    (total / len(sequences)).backward()
    return {
        name: torch.zeros(parameter.shape)
        if parameter.grad is None
        else parameter.grad * (theirs[name] - ours[name]).detach()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_equal_naive_swapping_and_autograd(tmp_path, family, double_precision_file) -> None:
    base = make_model(family)
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)  # of unequal length
    result = run(
        tmp_path,
        base,
        expert,
        prompts=prompts,
        estimand=("gain", "knockout", "share"),
        criterion=("kl", "anchor"),
        anchor_layer=0,
        max_new_tokens=3,
        share_steps=1,
        batch_size=7,
    )
    (scores,) = double_precision_file
    partition = partition_of(base, result)
    sequences = sequences_of(prompts, expert, 3)
    naive = Naive(base, expert, partition, sequences, (0, scores["anchor"]))
    for estimand in ("gain", "knockout"):
        for kind in KINDS:
            for component in components(partition, kind):
                values = naive.score(estimand, component)
                for criterion in ("kl", "anchor"):
                    found = at(scores[f"{estimand}/{criterion}/{kind}"], component)
                    want = values[criterion]
                    assert found == pytest.approx(want, abs=tolerance(family)), component
    for criterion in ("kl", "anchor"):
        products = gradients_between(base, expert, sequences, scores["anchor"], criterion)
        span = float((naive.at_expert[criterion] - naive.at_base[criterion]).mean())
        for component in fine_components(partition):
            want = sum(
                float(products[name][index].sum())
                for name, index in slices(partition, component).items()
            )
            found = at(scores[f"share/{criterion}/{component.kind}"], component)
            # norms of transformers compute in float32
            assert found == pytest.approx(want / span, abs=1e-6), component
        whole = sum(float(product.sum()) for product in products.values())
        complete = result.manifest.completeness[f"share/{criterion}"]
        assert complete == pytest.approx(whole / span, abs=1e-6)


def test_a_mixture_in_float32_multiplies_in_groups_and_scores_alike(tmp_path) -> None:
    base = make_model("qwen3_moe")
    expert = perturbed(base)
    options = {
        "prompts": write_prompts(tmp_path / "p.jsonl", 2, response=True),
        "estimand": ("gain", "share"),
        "share_steps": 1,
    }
    exact = run(tmp_path / "64", base, expert, **options)
    coarse = run(tmp_path / "32", base, expert, dtype="float32", **options)
    for key in exact.manifest.score_keys():
        torch.testing.assert_close(coarse.tensors[key], exact.tensors[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f in ("gpt2", "gemma3", "mixtral") else pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_activation_patches_equal_naive_ones(tmp_path, family, double_precision_file) -> None:
    base = make_model(family)
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    estimands = ("activation_gain", "activation_knockout")
    options = {"prompts": prompts, "criterion": ("kl",), "max_new_tokens": 2, "batch_size": 7}
    result = run(tmp_path, base, expert, estimand=estimands, **options)
    (scores,) = double_precision_file
    partition = partition_of(base, result)
    naive = Naive(base, expert, partition, sequences_of(prompts, expert, 2))
    for estimand in estimands:
        for kind in KINDS:
            for component in components(partition, kind):
                want = naive.score(estimand, component)["kl"]
                found = at(scores[f"{estimand}/kl/{kind}"], component)
                assert found == pytest.approx(want, abs=tolerance(family)), component


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shares_sum_to_one(tmp_path, family) -> None:
    base = make_model(family)
    if hasattr(base.config, "num_experts_per_tok"):  # where routing jumps, no integral sees it
        for module in base.modules():
            if hasattr(module, "top_k"):
                module.top_k = 3
        base.config.num_experts_per_tok = 3
    result = run(tmp_path, base, perturbed(base, 0.003), estimand=("share",), criterion=("kl",))
    assert result.manifest.completeness["share/kl"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_weight_belongs_to_exactly_one_component(family) -> None:
    model = make_model(family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    partition = Partition(Dims.from_config(model.config), shapes)
    owners = {name: torch.zeros(shape) for name, shape in shapes.items()}
    kinds = set()
    for component in fine_components(partition):
        cuts = slices(partition, component)
        assert cuts, component
        kinds.add(component.kind)
        for name, index in cuts.items():
            owners[name][index] += 1
    assert all((count == 1).all() for count in owners.values())
    assert kinds == set(KINDS) - {"layer"}
    matrices = {name.split(".")[-2] for name in partition.whole_tensors if len(shapes[name]) > 1}
    assert matrices <= {"embed_tokens", "embed_in", "wte", "wpe", "lm_head", "gate"}
    for name, layout in partition.layouts.items():
        values = torch.arange(1.0, layout.count + 1)
        spread = layout.expand(values[0] if layout.whole else values, shapes[name])
        for i in range(layout.count):
            assert (spread.expand(shapes[name])[part_of(layout, i, shapes[name])] == i + 1).all()
        ones = torch.ones([shapes[name][d] for d in layout.dims or (-1,)])
        owned = [float(spread.eq(i + 1).sum()) for i in range(layout.count)]
        if not layout.whole:
            assert layout.reduce(ones).tolist() == owned


#: mergekit asks for a stored unembedding of every Phi-3, for buffers of every GPT-NeoX, and for
#: experts in every layer of a mixture
UNTIED = {"phi3": {"tie_word_embeddings": False}}


def with_buffers(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        at = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{at}.bias"] = torch.ones(1, 1, 4, 4)
        tensors[f"{at}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{at}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2", "qwen3", *(n for n in [*FAMILIES, *OTHERS] if "-" not in n)]
)
def test_merge_equals_the_definition(tmp_path, family) -> None:
    LoaderCache.loaders.clear()
    config = (CONFIGS | FAMILIES | OTHERS)[family]()
    for key, value in UNTIED.get(family, {}).items():
        setattr(config, key, value)
    base = AutoModelForCausalLM.from_config(config)
    experts = [perturbed(base.double(), seed=seed).float() for seed in (1, 2)]
    base = base.float()
    names = ("base", "expert0", "expert1")
    for name, model in zip(names, (base, *experts), strict=True):
        save(model, tmp_path / name, torch.float32)
        model.float()
        if family == "gpt_neox":
            with_buffers(tmp_path / name)
    states = [
        {name: p.detach().clone() for name, p in model.named_parameters()}
        for model in (base, *experts)
    ]
    files = []
    for e, state in enumerate(states[1:]):
        file = make_score_file(
            dims=Dims.from_config(base.config),
            hidden_size=config.hidden_size,
            seed=e,
            delta_norm=norms(states[0], state),
            kinds=("layer", "tensor") if family in OTHERS else KINDS,
        )
        manifest = file.manifest.model_copy(update={"architecture": type(base).__name__})
        files.append(replace(file, manifest=manifest))
        scorefile.write(files[-1], tmp_path / f"scores{e}.safetensors")
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(tmp_path / "base"),
        "models": [
            {
                "model": str(tmp_path / f"expert{e}"),
                "parameters": {"scores": str(tmp_path / f"scores{e}.safetensors")},
            }
            for e in range(2)
        ],
        "dtype": "float32",
    }
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "out"), options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    evaluated = EvaluationModel(Checkpoint(recipe["base_model"]), torch.float32, "cpu")
    in_memory = evaluated.load(load_file(tmp_path / "out" / "model.safetensors"))
    expected = reference(states[0], states[1:], files)
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, states[0][n])]
    assert len(moved) > len(states[0]) / 2, "or the merge has taken next to nothing"
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(in_memory.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("family", "columns", "outside"),
    [
        (
            "gpt2",
            "qkv o up down norms other",
            ["embedding", "positions", "final norm", "final norm"],
        ),
        ("phi3", "qkv o gate+up down norms", ["embedding", "final norm"]),
        ("mixtral", "q k v o gate+up down norms other", ["embedding", "final norm", "lm_head"]),
    ],
)
def test_the_page_names_tensors_by_what_they_are(family, columns, outside) -> None:
    model = make_model(family)
    names = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    dims = Dims.from_config(model.config)
    manifest = make_score_file(dims=dims, delta_norm=names).manifest
    manifest = manifest.model_copy(update={"architecture": type(model).__name__})
    _, found, beside = tensor_grid(manifest, np.ones(len(names)))
    assert found == columns.split()
    assert [word for word, _ in beside] == outside


def test_a_checkpoint_without_the_models_prefix_is_read(tmp_path) -> None:
    """GPT-2 on the Hub is stored so."""
    model = make_model("gpt2")
    save(model, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = Checkpoint(str(tmp_path / "m"))
    for name, parameter in model.named_parameters():
        assert checkpoint.header(name) == (tuple(parameter.shape), "F64")
        assert torch.equal(checkpoint.tensor(name, torch.float64), parameter)
    with pytest.raises(UserError, match=r"m' has no tensor transformer.h.2.ln_1.weight"):
        checkpoint.header("transformer.h.2.ln_1.weight")


def test_experts_of_one_layer_may_be_stored_apart(tmp_path) -> None:
    model = make_model("qwen3_moe")
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in stored
    checkpoint = Checkpoint(str(tmp_path / "m"))
    for name, parameter in model.named_parameters():
        assert checkpoint.header(name) == (tuple(parameter.shape), "F64")
        assert torch.equal(checkpoint.tensor(name, torch.float64), parameter)


def save_mistral3(text: PreTrainedModel, folder: Path, vision: int = 0) -> None:
    """A text model within a larger one."""
    torch.manual_seed(vision)
    config = Mistral3Config(
        text_config=text.config.to_dict(),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "head_dim": 4,
        },
        tie_word_embeddings=False,
    )
    model = Mistral3ForConditionalGeneration(config).to(text.dtype)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder)
    save_tokenizer(folder)


def test_the_text_part_of_a_larger_model(tmp_path) -> None:
    """Its scores are those of the text model alone, and a merge changes nothing else."""
    base = make_model("mistral")
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    options = {"prompts": prompts, "max_new_tokens": 2, "device": DEVICE}
    alone = run(tmp_path / "alone", base, expert, **options)
    save_mistral3(base, tmp_path / "base")
    save_mistral3(expert, tmp_path / "expert", vision=1)
    request = ScoreRequest(
        base=str(tmp_path / "base"),
        expert=str(tmp_path / "expert"),
        out=tmp_path / "s.safetensors",
        dtype="float64",
        **options,
    )
    result = score(request, Quiet())
    assert result.manifest.architecture == "Mistral3ForConditionalGeneration"
    assert result.tensors.keys() == alone.tensors.keys()
    for key, tensor in result.tensors.items():
        assert torch.equal(tensor, alone.tensors[key]), key
    recipe = {
        "merge_method": "weight_patching",
        "base_model": request.base,
        "models": [{"model": request.expert, "parameters": {"scores": str(request.out)}}],
        "dtype": "float32",
    }
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "out"), options)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    in_memory = EvaluationModel(Checkpoint(request.base), torch.float32, "cpu").load(merged)
    states = [{n: p.detach() for n, p in m.named_parameters()} for m in (base, expert)]
    expected = reference(states[0], [states[1]], [result])
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        inside = name.removeprefix("language_model.")
        if inside != name:
            assert torch.equal(in_memory.get_parameter(inside), tensor)
        want = expected[inside] if inside != name else before[name].double()
        torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-6, msg=name)


def test_what_cannot_be_traced_is_refused() -> None:
    model = make_model("mixtral")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="'mixtral' sends positions to different experts"):
        check_traceable(Partition(Dims.from_config(model.config), shapes))


# --- architectures without a map ----------------------------------------------------------------


@pytest.mark.parametrize("family", list(OTHERS))
def test_without_a_map_layers_and_tensors_are_scored(
    tmp_path, family, double_precision_file, monkeypatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Quiet, "note", lambda _self, text: said.append(text))
    base = make_model(family)
    expert = perturbed(base)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    options = {"prompts": prompts, "criterion": ("kl", "anchor"), "max_new_tokens": 3}
    estimands = ("gain", "knockout", "share")
    result = run(
        tmp_path, base, expert, estimand=estimands, anchor_layer=0, share_steps=1, **options
    )
    note, *warned, memory = said
    assert all(text.startswith("warning: ") for text in warned)  # one step, small prompts
    assert memory.startswith("peak memory")
    assert "has no component map: scoring layers and tensors only" in note
    assert result.manifest.kinds == ("layer", "tensor")
    assert max(result.manifest.noise_floor.values()) < 1e-14
    (scores,) = double_precision_file
    partition = partition_of(base, result)
    sequences = sequences_of(prompts, expert, 3)
    naive = Naive(base, expert, partition, sequences, (0, scores["anchor"]))
    for criterion in ("kl", "anchor"):
        products = gradients_between(base, expert, sequences, scores["anchor"], criterion)
        span = float((naive.at_expert[criterion] - naive.at_base[criterion]).mean())
        for component in components(partition, "tensor"):
            found = at(scores[f"share/{criterion}/tensor"], component)
            want = float(products[component.name].sum()) / span
            assert found == pytest.approx(want, abs=EXACT), component
        for estimand in ("gain", "knockout"):
            for kind in ("layer", "tensor"):
                for component in components(partition, kind):
                    found = at(scores[f"{estimand}/{criterion}/{kind}"], component)
                    want = naive.score(estimand, component)[criterion]
                    assert found == pytest.approx(want, abs=EXACT), component
    with pytest.raises(UserError, match="kinds=head,neuron needs a component map, which"):
        run(tmp_path, base, expert, kinds=("head", "neuron"), overwrite=True, **options)
    with pytest.raises(UserError, match="activation_gain needs a component map"):
        run(tmp_path, base, expert, estimand=("activation_gain",), overwrite=True, **options)


def test_configs_that_compute_otherwise_are_refused_without_a_map(tmp_path) -> None:
    base = make_model("opt")
    expert = perturbed(base)
    expert.config = copy.deepcopy(base.config)
    expert.config.do_layer_norm_before = False
    with pytest.raises(UserError, match="configs differ in do_layer_norm_before: base"):
        run(tmp_path, base, expert)


def test_mixtures_with_dense_layers_have_no_map() -> None:
    dims = Dims.from_config(OTHERS["qwen3_moe-mixed"]())
    assert not dims.architecture.mapped
    with pytest.raises(UserError, match="trace needs a component map, which 'qwen3_moe' does not"):
        dims.require_map("trace")


def test_experts_of_a_model_without_a_map_are_not_fitted(tmp_path) -> None:
    world = make_world("opt", tmp_path)
    prompts = tuple((name, world / f"{name}.jsonl") for name in NAMES)
    with pytest.raises(UserError, match="fitting gates needs a component map"):
        fit(FitRequest(recipe=world / "recipe.yml", prompts=prompts), Quiet())


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = make_model("opt")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="'opt' has no list of 3 decoder layers"):
        len(Decoder(model).layers)


def test_another_text_model_within_a_larger_one_is_refused() -> None:
    config = Mistral3Config(text_config={"model_type": "llama"})
    with pytest.raises(UserError, match="'mistral3' with a 'llama' text model is not supported"):
        Dims.from_config(config)
