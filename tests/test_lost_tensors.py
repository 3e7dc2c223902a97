"""mergekit's own Llama definition knows no biases: a merge that would lose them must say so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.errors import UserError
from mergekit_wp.merging import preflight
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.host import unwritten
from tests.models import make_model, perturbed
from tests.test_scoring import run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("biased")
    base = make_model("llama")
    run(folder, base, perturbed(base), estimand=("share",), dtype="float32")
    model = {"model": str(folder / "expert")}
    content = {
        "merge_method": "weight_patching",
        "base_model": str(folder / "base"),
        "models": [model | {"parameters": {"scores": str(folder / "scores.safetensors")}}],
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yml"


def test_the_command_refuses(recipe) -> None:
    ensure_registered()
    with pytest.raises(
        UserError, match=r"mergekit does not write .*q_proj\.bias and \d+ more scored tensors"
    ):
        preflight.check(recipes.read(str(recipe)), MergeOptions())


def test_stock_mergekit_is_made_to_say_it(recipe, tmp_path, caplog) -> None:
    ensure_registered()
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    with caplog.at_level(logging.WARNING):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    said = [r.getMessage() for r in caplog.records if "does not write" in r.getMessage()]
    assert len(said) == 1
    assert "self_attn.q_proj.bias" in said[0]


@pytest.mark.parametrize(
    ("family", "missing"),
    [("gpt_neox", "gpt_neox.layers.0.attention.bias"), ("phi3", "lm_head.weight")],
)
def test_what_mergekit_asks_for_in_vain_is_said_before(tmp_path, family, missing) -> None:
    ensure_registered()
    base = make_model(family)
    run(tmp_path, base, perturbed(base), estimand=("share",), dtype="float32")
    scores = {"scores": str(tmp_path / "scores.safetensors")}
    content = {
        "merge_method": "weight_patching",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert"), "parameters": scores}],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"stores no {missing}, which mergekit requires of every"):
        preflight.check(recipes.read(str(tmp_path / "recipe.yml")), MergeOptions())


def test_layers_left_out_by_the_recipe_are_no_loss() -> None:
    scored = [f"model.layers.{i}.{name}" for i in range(2) for name in ("w", "b")]
    assert unwritten([*scored, "model.norm.weight"], {"model.layers.0.w", "model.norm.weight"}) == [
        "model.layers.0.b"
    ]
