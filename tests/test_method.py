import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.scripts import merge_raw_pytorch, multimerge
from safetensors.torch import load_file, save_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.files import scorefile
from tests.merging import (
    Family,
    State,
    assert_merged,
    by_mergekit,
    direct,
    llama_config,
    norms,
    qwen_config,
    reference,
    scores_for,
    states,
)

ensure_registered()


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


# --- the maths, against the definition component by component -------------------------------


@pytest.mark.parametrize("granularity", ["component", "tensor"])
@pytest.mark.parametrize("fusion", ["share", "winner", "gate", "topk"])
@pytest.mark.parametrize(
    ("config", "n_experts"),
    [(llama_config(), 2), (llama_config(tied=False), 3), (qwen_config(), 2)],
)
def test_every_fusion_equals_the_definition(
    tmp_path: Path, config: Any, n_experts: int, fusion: str, granularity: str
) -> None:
    family = Family.make(tmp_path, config, n_experts)
    options = {"fusion": fusion, "granularity": granularity, "power": 0.7, "estimand": "gain"}
    weights, densities = [1.5, -0.5, 0.25][:n_experts], [0.4, 0.9, 0.5][:n_experts]
    merged = direct(family, weight=weights, density=densities, **options, **{"lambda": 0.8})
    expected = reference(
        family.base.state,
        states(family),
        family.files,
        weights=weights,
        densities=densities,
        lam=0.8,
        **options,
    )
    assert_merged(merged, expected)
    assert any(not torch.equal(merged[name], family.base.state[name]) for name in merged)


def test_defaults_through_mergekit(family: Family, tmp_path: Path) -> None:
    merged = by_mergekit(family.recipe(), tmp_path / "out")
    assert_merged(merged, reference(family.base.state, states(family), family.files))


def test_bfloat16_rounds_once(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(), dtype=torch.bfloat16)
    merged = by_mergekit(family.recipe(dtype="bfloat16"), tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    expected = reference(family.base.state, states(family), family.files)
    assert_merged(merged, expected, rtol=2**-8)


def test_float64_is_merged_in_float64(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(), dtype=torch.float64)
    merged = direct(family)
    assert merged["model.norm.weight"].dtype == torch.float64
    assert_merged(merged, reference(family.base.state, states(family), family.files), rtol=1e-13)


def test_one_expert_with_equal_scores_comes_back_exactly(tmp_path: Path) -> None:
    family = Family.make(tmp_path, qwen_config(), n_experts=1)
    file = family.files[0]
    same = {
        key: torch.full_like(tensor, 0.3) if "/" in key else tensor
        for key, tensor in file.tensors.items()
    }
    scorefile.write(replace(file, tensors=same), family.paths[0])
    for fusion in ("share", "winner", "gate", "topk"):
        merged = direct(family, fusion=fusion)
        assert all(torch.equal(merged[n], family.experts[0].state[n]) for n in merged)


def test_no_positive_score_keeps_the_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = Family.make(tmp_path, llama_config(), n_experts=1)
    file = family.files[0]
    harmful = {k: -t.abs() if "/" in k else t for k, t in file.tensors.items()}
    scorefile.write(replace(file, tensors=harmful), family.paths[0])
    merged = direct(family, power=0.0)
    assert all(torch.equal(merged[n], family.base.state[n]) for n in merged)
    assert "no positive share/kl score: its expert adds nothing" in caplog.text


def test_scores_belong_to_their_expert(tmp_path: Path) -> None:
    """With deltas of equal norm the files can be swapped, and the merge is another one."""
    config = llama_config()
    family = Family.make(tmp_path, config)
    base = family.base.state
    family.experts[1].state = {n: 2 * base[n] - t for n, t in family.experts[0].state.items()}
    for e in (0, 1):
        file = scores_for(base, family.experts[e].state, config, seed=e)
        scorefile.write(file, family.paths[e])
    merged = direct(family)
    family.paths.reverse()
    swapped = direct(family)
    assert any(not torch.allclose(merged[n], swapped[n]) for n in merged)


def test_filters_and_gradients(family: Family, tmp_path: Path) -> None:
    filters = {
        "weight": [{"filter": "mlp", "value": 0.25}, {"value": 2.0}],
        "density": [0.2, 0.8],
    }
    recipe = family.recipe(filters, {}, parameters={"lambda": [1.0, 0.5], "fusion": "gate"})
    merged = by_mergekit(recipe, tmp_path / "out")
    for layer, density, lam in ((0, 0.2, 1.0), (1, 0.8, 0.5)):
        for name in merged:
            if f"layers.{layer}." not in name:
                continue
            weight = 0.25 if "mlp" in name else 2.0
            expected = reference(
                family.base.state,
                states(family),
                family.files,
                weights=[weight, 1.0],
                densities=[density, 1.0],
                fusion="gate",
                lam=lam,
            )
            torch.testing.assert_close(merged[name].double(), expected[name], rtol=1e-6, atol=1e-6)


def test_numbers_may_be_written_as_text(family: Family) -> None:
    one, other = direct(family, power="5e-1"), direct(family)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_threads_merge_alike(family: Family) -> None:
    expected = direct(family)
    with ThreadPoolExecutor(4) as pool:
        for merged in pool.map(lambda _: direct(family), range(8)):
            assert all(torch.equal(merged[n], expected[n]) for n in merged)


# --- coverage, tied weights ------------------------------------------------------------------


def test_tensors_without_scores_stay_at_the_base_and_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ("head", "neuron")
    family = Family.make(tmp_path, llama_config(), kinds=kinds)
    merged = by_mergekit(family.recipe(), tmp_path / "out")
    base = family.base.state
    for name in merged:
        kept = torch.equal(merged[name], base[name])
        assert kept == not_scored(name), name
    said = [r.getMessage() for r in caplog.records if "no scores" in r.getMessage()]
    assert said == [
        "10 of 20 tensors have no scores and stay at the base: model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.self_attn.k_proj.weight, ..."
    ]


def not_scored(name: str) -> bool:
    return not any(part in name for part in ("q_proj", "o_proj", "mlp"))


def test_an_expert_whose_file_lacks_a_tensor_adds_nothing_there(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config())
    kept = norms(family.base.state, family.experts[0].state)
    del kept["model.norm.weight"]
    file = scores_for(family.base.state, family.experts[0].state, family.config, delta_norm=kept)
    scorefile.write(file, family.paths[0])
    merged = direct(family, fusion="winner", granularity="tensor")
    name = "model.norm.weight"
    index = family.files[1].manifest.tensor_names.index(name)
    positive = family.files[1].tensors["share/kl/tensor"][index] > 0
    expected = family.experts[1].state[name] if positive else family.base.state[name]
    assert torch.equal(merged[name], expected)


def test_a_tied_head_stored_twice_stays_equal_to_the_embedding(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(tied=True), n_experts=1)
    expert = family.experts[0]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    twice = expert.state | {head: expert.state[embedding].clone()}
    save_file(twice, expert.path / "model.safetensors", metadata={"format": "pt"})
    merged = by_mergekit(family.recipe(parameters={"fusion": "gate"}), tmp_path / "out")
    assert torch.equal(merged[head], merged[embedding])


def test_without_a_config_a_file_without_a_head_means_a_tied_model(family: Family) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for checkpoint in (family.base, *family.experts):
        checkpoint.state[head] = checkpoint.state[embedding].clone()
    merged = direct(family, fusion="gate")
    assert torch.equal(merged[head], merged[embedding])
    assert not torch.equal(merged[head], family.base.state[head])


def test_an_untied_head_keeps_its_own_scores(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(tied=False))
    merged = by_mergekit(family.recipe(), tmp_path / "out")
    assert_merged(merged, reference(family.base.state, states(family), family.files))


# --- score files -----------------------------------------------------------------------------


def test_a_score_file_is_read_once_and_again_when_rewritten(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = scorefile.read
    monkeypatch.setattr(scorefile, "read", lambda path: reads.append(str(path)) or real(path))
    before = by_mergekit(family.recipe(), tmp_path / "one")
    assert sorted(reads) == sorted(str(path) for path in family.paths)
    file = scores_for(family.base.state, family.experts[0].state, family.config, seed=9)
    scorefile.write(file, family.paths[0])
    after = by_mergekit(family.recipe(), tmp_path / "two")
    assert reads[2:] == [str(family.paths[0])]
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_slices_in_place_are_merged(family: Family, tmp_path: Path) -> None:
    slices = []
    for layer in (0, 1):
        sources = [
            {"model": str(expert.path), "layer_range": [layer, layer + 1]}
            for expert in family.experts
        ]
        for source, path in zip(sources, family.paths, strict=True):
            source["parameters"] = {"scores": str(path)}
        sources.append({"model": str(family.base.path), "layer_range": [layer, layer + 1]})
        slices.append({"sources": sources})
    recipe = family.recipe(slices=slices)
    del recipe["models"]
    merged = by_mergekit(recipe, tmp_path / "out")
    assert_merged(merged, reference(family.base.state, states(family), family.files))


def test_a_plan_in_another_thread_is_another_plan(family: Family, tmp_path: Path) -> None:
    results: dict[int, State] = {}

    def work(i: int) -> None:
        results[i] = by_mergekit(family.recipe(), tmp_path / str(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_mergekit_multi_runs_several_plans(family: Family, tmp_path: Path) -> None:
    """The second recipe merges onto the first one's result, for which its scores were made."""
    first = family.recipe({"weight": 0.5}, {}, name="first")
    merged = reference(family.base.state, states(family), family.files, weights=[0.5, 1.0])
    start = {name: tensor.float() for name, tensor in merged.items()}
    path = tmp_path / "second.safetensors"
    scorefile.write(scores_for(start, family.experts[0].state, family.config, seed=7), path)
    second = family.recipe({"scores": str(path)}, {}, base_model="first")
    del second["models"][1]
    recipe = tmp_path / "multi.yml"
    recipe.write_text(yaml.safe_dump_all([first, second]))
    arguments = [str(recipe), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "inter")]
    result = CliRunner().invoke(multimerge.main, [*arguments, "--quiet", "--no-copy-tokenizer"])
    assert result.exception is None, result.exception
    expected = reference(start, states(family)[:1], [scorefile.read(path)])
    assert_merged(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_mergekit_pytorch_has_no_config(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    for holder, key in [(recipe, "base_model"), *((model, "model") for model in recipe["models"])]:
        holder[key] = str(Path(holder[key]) / "model.safetensors")
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(merge_raw_pytorch.main, [str(path), str(tmp_path / "out")])
    assert result.exception is None, result.exception
    expected = reference(family.base.state, states(family), family.files)
    assert_merged(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_tensors_that_only_the_base_has_stay(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    for holder, key in [(recipe, "base_model"), *((model, "model") for model in recipe["models"])]:
        holder[key] = str(Path(holder[key]) / "model.safetensors")
    extra = family.base.state | {"extra.weight": torch.ones(3)}
    save_file(extra, recipe["base_model"])
    # mergekit-pytorch lists tensors of `models` only, so the base is one of them
    recipe["models"].append({"model": recipe["base_model"]})
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = [str(path), str(tmp_path / "out"), "--tensor-union"]
    result = CliRunner().invoke(merge_raw_pytorch.main, arguments)
    assert result.exception is None, result.exception
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["extra.weight"], torch.ones(3))


def test_recipes_survive_mergekits_own_yaml(family: Family) -> None:
    config = MergeConfiguration.model_validate(family.recipe())
    again = MergeConfiguration.model_validate(yaml.safe_load(config.to_yaml()))
    assert again == config
