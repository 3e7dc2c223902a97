"""What the merge method refuses, before anything is read where it can."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mergekit.merge_methods as merge_methods
import pytest
import torch
import yaml
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import save_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.method import weight_patching
from tests.merging import (
    Family,
    add,
    assert_merged,
    by_mergekit,
    direct,
    llama_config,
    random_state,
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


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 1.5}, "'density' must be a number from 0 to 1, not 1.5"),
        ({"density": -0.1}, "'density' must be a number from 0 to 1, not -0.1"),
        ({"weight": float("nan")}, "'weight' must be a finite number, not nan"),
        ({"weight": "much"}, "'weight' must be a finite number, not 'much'"),
        ({"lambda": float("inf")}, "'lambda' must be a finite number, not inf"),
        ({"power": -1}, "'power' must be a number of at least 0, not -1"),
        ({"fusion": "mean"}, "'fusion' must be one of share, winner, gate, topk, path, not 'mean'"),
        ({"estimand": 3}, "'estimand' must be one of share, gain, knockout, not 3"),
        ({"granularity": "layer"}, "'granularity' must be one of component, tensor, not 'layer'"),
        ({"estimand": "knockout"}, "has no 'knockout/kl' scores, it has share/kl, gain/kl"),
        ({"criterion": "anchor"}, "has no 'share/anchor' scores, it has share/kl, gain/kl"),
    ],
)
def test_bad_values_are_named(family: Family, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        direct(family, **parameters)
    assert message in str(caught.value)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", refuse)


@pytest.mark.usefixtures("unread")
def test_missing_score_file_is_found_while_planning(family: Family, tmp_path: Path) -> None:
    family.paths[1].unlink()
    with pytest.raises(UserError, match="expert1.safetensors not found; make one with"):
        by_mergekit(family.recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unread")
def test_scores_not_in_the_file_are_missed_while_planning(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no 'share/logprob' scores"):
        by_mergekit(family.recipe(parameters={"criterion": "logprob"}), tmp_path / "out")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8, "head_dim": 4}, "n_heads 4, not 8"),
        ({"num_hidden_layers": 3}, "n_layers 2, not 3"),
        ({"intermediate_size": 8}, "n_neurons 6, not 8"),
        ({"hidden_size": 32}, "hidden_size 16, not 32"),
    ],
)
def test_another_architecture_is_refused_before_any_tensor_is_read(
    family: Family, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    config = llama_config(**change)
    state = random_state(config, 0)
    scorefile.write(scores_for(state, add(state, state), config), family.paths[1])
    with pytest.raises(UserError) as caught:
        by_mergekit(family.recipe(), tmp_path / "out")
    assert "expert1.safetensors is of another architecture than the base model" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.usefixtures("unread")
def test_another_model_class_is_refused(family: Family, tmp_path: Path) -> None:
    manifest = family.files[0].manifest.model_copy(update={"architecture": "MistralForCausalLM"})
    scorefile.write(replace(family.files[0], manifest=manifest), family.paths[0])
    with pytest.raises(UserError, match="architecture LlamaForCausalLM, not MistralForCausalLM"):
        by_mergekit(family.recipe(), tmp_path / "out")


def test_a_plan_that_failed_leaves_nothing_to_the_next(family: Family, tmp_path: Path) -> None:
    """mergekit-multi plans several recipes in one process."""
    config = llama_config(num_hidden_layers=3)
    deep = Family.make(tmp_path / "deep", config)
    bad = deep.recipe({"weight": float("nan")}, {})
    with pytest.raises(UserError, match="'weight'"):
        by_mergekit(bad, tmp_path / "bad")
    merged = by_mergekit(family.recipe(), tmp_path / "good")
    assert_merged(merged, reference(family.base.state, states(family), family.files))


def test_scores_of_another_expert_are_refused_by_name(family: Family, tmp_path: Path) -> None:
    family.paths.reverse()
    with pytest.raises(UserError) as caught:
        by_mergekit(family.recipe(), tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("tensor ")
    assert "of another expert, base, revision or shifted layers" in message
    assert "its difference from the base has norm" in message


def test_shifted_layers_are_refused(family: Family, tmp_path: Path) -> None:
    sources = [
        {"model": str(m.path), "layer_range": [1, 2]} for m in (family.base, *family.experts)
    ]
    for source, path in zip(sources[1:], family.paths, strict=True):
        source["parameters"] = {"scores": str(path)}
    recipe = family.recipe(slices=[{"sources": sources}])
    del recipe["models"]
    with pytest.raises(UserError, match="tensor model.layers.0.* shifted layers"):
        by_mergekit(recipe, tmp_path / "out")


def test_a_merge_coarser_than_the_checkpoints_is_not_refused(tmp_path: Path) -> None:
    """Small deltas drown in bfloat16's rounding of float32 weights; that is no mistake."""
    config = llama_config()
    family = Family.make(tmp_path, config, n_experts=1)
    base = family.base.state
    small = add(base, random_state(config, 5, 1e-4))
    scorefile.write(scores_for(base, small, config), family.paths[0])
    save_file(small, family.experts[0].path / "model.safetensors", metadata={"format": "pt"})
    by_mergekit(family.recipe(dtype="bfloat16"), tmp_path / "coarse")
    other = add(base, random_state(config, 5, 1.1e-4))
    scorefile.write(scores_for(base, other, config), family.paths[0])
    with pytest.raises(UserError, match="of another expert"):
        by_mergekit(family.recipe(dtype="bfloat16"), tmp_path / "strict")


def test_a_tensor_that_does_not_fit_is_named(family: Family) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    odd = torch.ones(7, 16)
    file = family.files[0]
    kept = dict(zip(file.manifest.tensor_names, file.tensors["delta_norm"].tolist(), strict=True))
    kept[name] = float((odd * 2 - odd).norm())
    scorefile.write(
        scores_for(family.base.state, family.experts[0].state, family.config, delta_norm=kept),
        family.paths[0],
    )
    with pytest.raises(UserError, match=f"{name}: dimension 0 has 7 entries, not a multiple of 6"):
        merge_tensors(
            [odd, 2 * odd],
            weight_patching,
            base_index=0,
            name=name,
            parameters={"scores": str(family.paths[0])},
        )


def test_structure(family: Family) -> None:
    a, b = torch.zeros(2, 2), torch.ones(2, 2)
    scores = {"scores": str(family.paths[0])}
    with pytest.raises(ValueError, match="requires a base input"):
        merge_tensors([a, b], weight_patching, name="x", parameters=scores)
    with pytest.raises(ValueError, match="at least 1 non-base inputs"):
        merge_state_dicts({"base": {"x": a}}, weight_patching, base="base", parameters=scores)
    with pytest.raises(UserError, match="by name"):
        merge_tensors([a, b], weight_patching, base_index=0, parameters=scores)
    with pytest.raises(TypeError, match="required parameter scores"):  # mergekit's own words
        merge_tensors([a, b], weight_patching, base_index=0, name="x")
    with pytest.raises(UserError, match="has no 'scores'; give the score file"):
        merge_tensors([a, b], weight_patching, base_index=0, name="x", parameters={"scores": ""})
    assert [p.name for p in weight_patching.spec.parameters if p.required] == ["scores"]
    assert merge_methods.get("weight_patching") is weight_patching


def test_path_fusion_needs_path_scores(family: Family, tmp_path: Path) -> None:
    words = "has no 'path/kl' scores, which 'fusion: path' needs: fit the recipe's experts together"
    with pytest.raises(UserError, match=words):
        by_mergekit(family.recipe(parameters={"fusion": "path"}), tmp_path / "out")


@pytest.mark.parametrize("name", ["guards", "harm", "gates"])
def test_the_command_refuses_unknown_parameters(family: Family, tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(family.recipe(parameters={name: "g.safetensors"})))
    with pytest.raises(UserError, match=f"the recipe has an unknown parameter '{name}'"):
        recipes.read(path)
