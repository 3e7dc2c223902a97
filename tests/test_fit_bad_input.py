"""What a fit refuses, and what a merge by gates refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files import gatesfile
from mergekit_wp.files.gatesfile import GatesFile
from tests.fitting import fitted, load
from tests.models import save
from tests.test_company import NAMES, make_world

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "2.0"}, "--start 2 is not within 0 and 1.5"),
        ({"start": "none.safetensors"}, "gates file none.safetensors not found"),
        ({"start": "scores"}, "is of 'ties' and has no scores to start from"),
        ({"prompts": ()}, "has no prompts; add --prompts east=FILE.jsonl"),
        ({"max_prompts": 2}, "has prompts for one step only"),
        ({"guard_weight": 2.0}, "--guard-weight 2 weighs guards, and none is given"),
    ],
)
def test_bad_input(world: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted(world, tmp_path / "gates.safetensors", **change)
    assert list(tmp_path.iterdir()) == []


def test_behaviours_of_one_name_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    guard = tmp_path / "other" / f"{NAMES[0]}.jsonl"
    guard.write_text((world / f"{NAMES[0]}.jsonl").read_text())
    with pytest.raises(UserError, match=f"would be called '{NAMES[0]}'; rename one"):
        fitted(world, tmp_path / "gates.safetensors", guards=(guard,))
    assert not (tmp_path / "gates.safetensors").exists()


def test_no_recipe_is_overwritten(world: Path, tmp_path: Path) -> None:
    before = (world / "recipe.yml").read_text()
    for out, taken in (
        (tmp_path / "gates.yml", "the gates file"),
        (world / "recipe.safetensors", "the recipe"),
    ):
        with pytest.raises(UserError, match=f"where {taken} is; choose another name"):
            fitted(world, out)
        assert not out.exists()
    assert (world / "recipe.yml").read_text() == before and not list(tmp_path.iterdir())


def test_bad_recipes_and_files(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out, steps=1)
    recipe = yaml.safe_load((tmp_path / "gates.yml").read_text())
    one, two = recipe["models"]

    def refused(change: dict[str, Any]) -> str:
        (tmp_path / "bad.yml").write_text(yaml.safe_dump(recipe | change))
        done = CliRunner().invoke(cli, ["merge", str(tmp_path / "bad.yml"), str(tmp_path / "m")])
        assert isinstance(done.exception, UserError) and not (tmp_path / "m").exists()
        return str(done.exception)

    gates = recipe["parameters"]["gates"]
    assert "gates file" in refused({"parameters": {"gates": "none.safetensors"}})
    assert "has 'power'" in refused({"parameters": {"gates": gates, "power": 1.0}})
    scored = one | {"parameters": {"scores": gates}}
    assert "score file" in refused({"models": [scored, two]})
    assert "in the company of" in refused({"models": [one]})
    stranger = {"model": str(world / "base")}
    assert "no gates of model" in refused({"models": [one, two, stranger | {"model": "x/y"}]})
    (tmp_path / "swapped").mkdir()
    save(load(world / "west"), tmp_path / "swapped" / "east")
    assert "made for" in refused({"models": [{"model": str(tmp_path / "swapped" / "east")}, two]})

    for change, message in (
        ({"gate/0/head": file.tensors["gate/0/head"] + 2}, "holds a gate above 1.5"),
        ({"gate/0/head": file.tensors["gate/0/head"][:1]}, "has shape"),
        ({"gate/0/head": file.tensors["gate/0/head"] * float("nan")}, "holds NaN"),
        ({"more": torch.ones(1)}, "'more' is not in the manifest"),
    ):
        with pytest.raises(UserError, match=message):
            gatesfile.write(GatesFile(file.manifest, file.tensors | change), out)
    with pytest.raises(ValueError, match="steps do not count up from 0"):
        said = file.manifest.model_dump()
        type(file.manifest).model_validate(said | {"history": said["history"][1:], "best_step": 1})
    with pytest.raises(UserError, match="it is a gates file"):
        from mergekit_wp.files import scorefile

        scorefile.read(out)
