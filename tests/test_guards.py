"""Guards: what an expert's components do to other behaviours, subtracted before fusion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import CompanyMember, Scale, ScoreFile
from mergekit_wp.merging import recipe as recipes
from tests.merging import Family, by_mergekit, llama_config, norms, reference, scores_for
from tests.test_method import assert_merged, states

SLICED = ("head", "kv_group", "neuron")


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


def guard(family: Family, e: int, path: Path, seed: int, **manifest: Any) -> ScoreFile:
    """Scores of expert e on a behaviour that it makes 3 nats worse: each score is -1/3 of that."""
    base, expert = family.base.state, family.experts[e].state
    file = scores_for(base, expert, family.config, seed, criteria=("logprob",))
    scale = {"logprob": Scale(base=-1.0, expert=-4.0)}
    file = replace(file, manifest=file.manifest.model_copy(update={"scale": scale} | manifest))
    scorefile.write(file, path)
    return file


def less_harm(own: ScoreFile, guards: list[ScoreFile], harm: float) -> ScoreFile:
    """The definition, written out on the file's tensors."""
    fine = own.manifest.tensor_names
    whole = [i for i, n in enumerate(fine) if n in own.fine_tensor_names]
    tensors = {k: t.double().clone() for k, t in own.tensors.items()}

    def parts(file: ScoreFile, key: str) -> dict[str, torch.Tensor]:
        found = {kind: file.tensors[f"share/{key}/{kind}"].double() for kind in SLICED}
        return found | {"tensor": file.tensors[f"share/{key}/tensor"].double()[whole]}

    mine = parts(own, "kl")
    total = sum(t.clamp(min=0).sum() for t in mine.values())
    mine = {kind: t / total for kind, t in mine.items()}
    for file in guards:
        worse = {k: (3 * t).clamp(min=0) for k, t in parts(file, "logprob").items()}
        all_of_it = sum(t.sum() for t in worse.values())
        mine = {k: t - harm * worse[k] / all_of_it for k, t in mine.items()}
    for kind in SLICED:
        tensors[f"share/kl/{kind}"] = mine[kind]
    tensors["share/kl/tensor"][whole] = mine["tensor"]
    return replace(own, tensors=tensors)


def test_a_guarded_merge_equals_the_definition(family: Family, tmp_path: Path) -> None:
    files = [guard(family, 0, tmp_path / f"g{i}.safetensors", 40 + i) for i in range(2)]
    text = f"{tmp_path}/g0.safetensors, {tmp_path}/g1.safetensors"
    merged = by_mergekit(
        family.recipe({"guards": text}, {}, parameters={"harm": 0.6}), tmp_path / "out"
    )
    changed = [less_harm(family.files[0], files, 0.6), family.files[1]]
    assert_merged(merged, reference(family.base.state, states(family), changed))
    plain = reference(family.base.state, states(family), family.files)
    assert any(not torch.allclose(merged[n].double(), plain[n], atol=1e-4) for n in merged)


def test_guards_are_found_beside_the_recipe(family: Family, tmp_path: Path) -> None:
    guard(family, 0, tmp_path / "scores" / "g.safetensors", 40)
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(family.recipe({"guards": "scores/g.safetensors"}, {})))
    found = recipes.read(path).config.models[0].parameters["guards"]
    assert found == str(tmp_path / "scores" / "g.safetensors")
    path.write_text(yaml.safe_dump(family.recipe({"guards": "scores/none.safetensors"}, {})))
    with pytest.raises(UserError, match=r"scores/none.safetensors not found"):
        recipes.read(path)


def test_a_list_of_guards_is_refused(family: Family, tmp_path: Path) -> None:
    for i in range(2):
        guard(family, 0, tmp_path / f"g{i}.safetensors", 40 + i)
    paths = [str(tmp_path / f"g{i}.safetensors") for i in range(2)]
    recipe = family.recipe({"guards": paths}, {})
    with pytest.raises(UserError, match="'guards' is .* for one tensor and .* separated by commas"):
        by_mergekit(recipe, tmp_path / "out")
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="'guards' must be one text, files separated by commas"):
        recipes.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": "expert"}, "was scored on the expert's own answers"),
        ({"kinds": ("tensor",)}, "has other kinds of component"),
    ],
)
def test_a_guard_that_cannot_say_is_refused(
    family: Family, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "g.safetensors"
    file = guard(family, 0, path, 40)
    kept = {
        k: t
        for k, t in file.tensors.items()
        if "kinds" not in change or k.count("/") < 2 or k.endswith("/tensor")
    }
    manifest = file.manifest.model_copy(update=change)
    scorefile.write(ScoreFile(manifest, kept), path)
    with pytest.raises(UserError, match=message):
        by_mergekit(family.recipe({"guards": str(path)}, {}), tmp_path / "out")


def test_other_files_are_no_guards(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    for text, message in [
        (str(family.paths[0]), "is that file itself"),
        (str(family.paths[1]), "was made for another expert or base"),
    ]:
        with pytest.raises(UserError, match=message):
            by_mergekit(family.recipe({"guards": text}, {}), tmp_path / "out")
    only_kl = scores_for(
        family.base.state,
        family.experts[0].state,
        family.config,
        7,
        delta_norm=norms(family.base.state, family.experts[0].state),
    )
    scorefile.write(only_kl, path)
    with pytest.raises(UserError, match="has no 'share/logprob' scores"):
        by_mergekit(family.recipe({"guards": str(path)}, {}), tmp_path / "out")


def test_guards_and_the_guided_path_exclude_each_other(family: Family, tmp_path: Path) -> None:
    guard(family, 0, tmp_path / "g.safetensors", 40)
    recipe = family.recipe(
        {"guards": str(tmp_path / "g.safetensors")}, {}, parameters={"fusion": "path"}
    )
    words = (
        "has no 'path/kl' scores, which 'fusion: path' needs: score the recipe's experts together"
    )
    with pytest.raises(UserError, match=words):
        by_mergekit(recipe, tmp_path / "out")
    MergeConfiguration.model_validate(recipe)  # the text itself is a recipe


def test_harm_must_be_a_number(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'harm' must be a number of at least 0, not -1"):
        by_mergekit(family.recipe(parameters={"harm": -1}), tmp_path / "out")


def test_the_command_refuses_bad_guards_before_it_merges(family: Family, tmp_path: Path) -> None:
    def refused(*per_expert: dict[str, Any], **top: Any) -> str:
        path, out = tmp_path / "recipe.yml", tmp_path / "out"
        path.write_text(yaml.safe_dump(family.recipe(*per_expert, **top)))
        done = CliRunner().invoke(cli, ["merge", str(path), str(out), "--no-copy-tokenizer"])
        assert isinstance(done.exception, UserError), done.output
        assert not out.exists() and "Executing" not in done.output
        return str(done.exception)

    guard(family, 1, tmp_path / "other.safetensors", 40)
    other = str(tmp_path / "other.safetensors")
    assert "was made for another expert" in refused({"guards": other}, {})
    own = str(family.paths[0])
    assert "is that file itself" in refused({"guards": own}, {})


def test_path_fusion_takes_no_guards(family: Family, tmp_path: Path) -> None:
    company = tuple(
        CompanyMember(reference=name, weights_sha256="0" * 64, behavior=name, recovery=0.9)
        for name in ("expert0", "expert1")
    )
    for e, path in enumerate(family.paths):
        file = family.files[e]
        expert = file.manifest.expert.model_copy(update={"reference": f"expert{e}"})
        update = {"company": company, "expert": expert, "estimands": ("path", "gain")}
        tensors = {key.replace("share/", "path/"): t for key, t in file.tensors.items()}
        scorefile.write(ScoreFile(file.manifest.model_copy(update=update), tensors), path)
    guard(family, 0, tmp_path / "g.safetensors", 40)
    recipe = family.recipe(
        {"guards": str(tmp_path / "g.safetensors")}, {}, parameters={"fusion": "path"}
    )
    with pytest.raises(UserError, match="which 'fusion: path' does not use"):
        by_mergekit(recipe, tmp_path / "out")
