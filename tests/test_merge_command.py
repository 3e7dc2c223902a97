import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.card.write import write_card
from mergekit_wp.cli import cli, main
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.merging.merge import merge, recipe_of
from tests.merging import (
    Family,
    State,
    add,
    llama_config,
    random_state,
    reference,
    scores_for,
)


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


def write(recipe: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return path


def invoke(recipe: Path, out: Path, *options: str) -> Result:
    arguments = [str(recipe), str(out), "--quiet", "--no-copy-tokenizer", *options]
    return CliRunner().invoke(cli, ["merge", *arguments])


def refused(recipe: Path, out: Path, *options: str) -> str:
    """The message of a refusal that left nothing behind."""
    before = tree(recipe.parent)
    result = invoke(recipe, out, *options)
    assert isinstance(result.exception, UserError), result.exception
    assert tree(recipe.parent) == before
    message = str(result.exception)
    assert "\n" not in message
    return message


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def done(recipe: Path, out: Path, *options: str) -> State:
    result = invoke(recipe, out, *options)
    assert result.exception is None, result.exception
    assert f"merged model written to {out}" in result.output
    return load_file(out / "model.safetensors")


# --- merging ---------------------------------------------------------------------------------


def test_the_result_is_mergekits_own(family: Family, tmp_path: Path) -> None:
    source = "# mine\n" + yaml.safe_dump(family.recipe())
    recipe = write(source, tmp_path / "recipe.yml")
    merged = done(recipe, tmp_path / "deep" / "er" / "out")
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    run_merge(config, str(tmp_path / "stock" / "out"), options, config_source=source)
    out, stock = tmp_path / "deep" / "er" / "out", tmp_path / "stock" / "out"
    assert set(os.listdir(out)) - set(os.listdir(stock)) == {"scores", "contributions.png"}
    texts = {"README.md", "mergekit_config.yml"}  # see test_card
    assert texts < set(os.listdir(stock))
    for name in set(os.listdir(stock)) - texts:
        assert (out / name).read_bytes() == (stock / name).read_bytes(), name
    assert (out / "mergekit_config.yml").read_text().startswith("# mine\n")
    assert "# mine" in (out / "README.md").read_text()
    for line in (stock / "README.md").read_text().splitlines():
        if not line.startswith(("base_model:", "    scores:")):  # folders are no Hub ids; copies
            assert line in (out / "README.md").read_text()
    assert os.listdir(out.parent) == ["out"]
    states = [expert.state for expert in family.experts]
    expected = reference(family.base.state, states, family.files)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_score_paths_are_looked_up_beside_the_recipe_then_here(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = done(write(family.recipe(), tmp_path / "absolute.yml"), tmp_path / "absolute")
    relative = family.recipe(
        {"scores": "scores/expert0.safetensors"},
        {"scores": [{"filter": "mlp", "value": "b.safetensors"}, {"value": "b.safetensors"}]},
    )
    monkeypatch.chdir(tmp_path / "base")
    family.paths[1].rename(tmp_path / "base" / "b.safetensors")
    (tmp_path / "base" / "scores").mkdir()
    (tmp_path / "base" / "scores" / "expert0.safetensors").write_text("the recipe's folder first")
    merged = done(write(relative, tmp_path / "relative.yml"), tmp_path / "relative")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    written = yaml.safe_load((tmp_path / "relative" / "mergekit_config.yml").read_text())
    first, second = (model["parameters"]["scores"] for model in written["models"])
    assert first == "scores/expert0.safetensors"
    assert [entry["value"] for entry in second] == ["scores/b.safetensors"] * 2


def test_other_methods_and_relative_targets(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = family.recipe({"weight": 0.5}, {"weight": 0.5}, merge_method="task_arithmetic")
    for model in recipe["models"]:
        del model["parameters"]["scores"]
    monkeypatch.chdir(tmp_path)
    done(write(recipe, tmp_path / "recipe.yml"), Path("ta"))
    merged = load_file(tmp_path / "ta" / "model.safetensors")
    for name, tensor in merged.items():
        mean = sum(expert.state[name] for expert in family.experts) / 2
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-5)


def test_merging_into_a_folder_again_replaces_its_weights_and_keeps_other_files(
    family: Family, tmp_path: Path
) -> None:
    recipe, out = write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out"
    assert invoke(recipe, out, "--out-shard-size", "4k").exception is None
    assert (out / "model.safetensors.index.json").exists()
    (out / "notes.txt").write_text("mine")
    done(recipe, out, "--overwrite")
    assert [name for name in os.listdir(out) if name.startswith("model")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"


def test_modules_and_slices_recipes(family: Family, tmp_path: Path) -> None:
    plain = family.recipe()
    expected = done(write(plain, tmp_path / "plain.yml"), tmp_path / "plain")
    models = plain.pop("models")
    by_module = plain | {"modules": {"default": {"models": models}}}
    sources = [model | {"layer_range": [0, 2]} for model in models]
    sources.append({"model": str(family.base.path), "layer_range": [0, 2]})
    by_slice = plain | {"slices": [{"sources": sources}]}
    for name, recipe in (("modules", by_module), ("slices", by_slice)):
        merged = done(write(recipe, tmp_path / f"{name}.yml"), tmp_path / name)
        assert all(torch.equal(merged[n], expected[n]) for n in expected)


def test_uncovered_tensors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = Family.make(tmp_path, llama_config(), kinds=("neuron",))
    done(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert "14 of 20 tensors have no scores and stay at the base" in caplog.text


def test_help_says_where_scores_are_looked_up() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["merge", "--help"]).output.split())
    assert "looked up in the recipe's folder first, then in the current one" in shown
    assert "--lora-merge-cache" in shown


# --- refusals: one line, and nothing written -------------------------------------------------


def change(family: Family, **changes: Any) -> dict[str, Any]:
    """A recipe whose first model's block, parameters or top level is changed."""
    recipe = family.recipe()
    for where, values in changes.items():
        holder = {
            "top": recipe,
            "model": recipe["models"][0],
            "parameters": recipe["models"][0]["parameters"],
        }[where]
        for key, value in values.items():
            if value is None:
                del holder[key]
            else:
                holder[key] = value
    return recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"wieght": 1.0}}, "has an unknown parameter 'wieght'; per model: scores, "),
        ({"top": {"parameters": {"lamda": 1}}}, "the recipe has an unknown parameter 'lamda'"),
        ({"parameters": {"fusion": "gate"}}, "'fusion' is shared by all models; move it from"),
        (
            {"top": {"parameters": {"fusion": "path", "power": 1}}},
            "'power' does nothing under fusion 'path', only under share; leave it out",
        ),
        (
            {"top": {"parameters": {"fusion": "path", "estimand": "gain"}}},
            "'estimand' does nothing under fusion 'path', only under share, winner, gate, topk",
        ),
        ({"parameters": {"scores": None}}, "has no 'scores'; give it the score file that"),
        ({"parameters": {"scores": 3}}, "'scores' must be a path, not 3"),
        ({"parameters": {"density": 1.5}}, "'density' must be a number from 0 to 1, not 1.5"),
        ({"parameters": {"density": [0.5, 2]}}, "'density' must be a number from 0 to 1, not 2"),
        ({"top": {"base_model": None}}, "weight_patching needs a 'base_model'"),
        ({"top": {"base_mode": "x"}}, "unknown key 'base_mode'; allowed are "),
        ({"model": {"weight": 1.0}}, "models[0]: unknown key 'weight'; allowed are model, param"),
        ({"top": {"models": None}}, "Exactly one of 'models', 'slices', or 'modules'"),
        ({"top": {"merge_method": None}}, "merge_method: Field required"),
        ({"top": {"parameters": {"estimand": "knockout"}}}, "has no 'knockout/kl' scores, it has"),
        ({"model": {"model": "/no/such/folder"}}, "model /no/such/folder cannot be read: "),
        ({"top": {"merge_method": "weight_patchin"}}, "Unimplemented merge method weight_patchin"),
        ({"top": {"dtype": "bf16"}}, 'Unimplemented dtype "bf16"'),
        ({"top": {"merge_method": "ties"}}, "Missing required parameter weight for "),
    ],
)
def test_bad_recipes(family: Family, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = write(change(family, **changes), tmp_path / "recipe.yml")
    assert message in refused(recipe, tmp_path / "new" / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML: while parsing a flow sequence"),
        ("- a\n", "is not a mapping with 'merge_method' and 'models'"),
        ("a: 1\n---\nb: 2\n", "holds several documents; mergekit-multi runs such files"),
        ("", "is not a mapping"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(write(text, tmp_path / "recipe.yml"), tmp_path / "out")


def test_missing_recipe(tmp_path: Path) -> None:
    assert "cannot be read: " in refused(tmp_path / "none.yml", tmp_path / "out")


def test_missing_score_file_names_both_places(family: Family, tmp_path: Path) -> None:
    recipe = write(change(family, parameters={"scores": "gone.safetensors"}), tmp_path / "r.yml")
    message = refused(recipe, tmp_path / "out")
    words = "score file gone.safetensors not found, neither in the recipe's folder"
    assert message.startswith(words)
    assert "make one with 'mergekit-wp score BASE EXPERT" in message


def test_truncated_score_file(family: Family, tmp_path: Path) -> None:
    family.paths[0].write_bytes(family.paths[0].read_bytes()[:-9])
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    assert "is unreadable or truncated" in refused(recipe, tmp_path / "out")


def test_truncated_weights(family: Family, tmp_path: Path) -> None:
    weights = family.experts[1].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    message = refused(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert message.startswith(f"model {family.experts[1].path} cannot be read: Error while")


def test_the_base_takes_no_parameters(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    recipe["models"].append({"model": str(family.base.path), "parameters": {"weight": 0.5}})
    message = refused(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    assert "takes no parameters, but has 'weight'" in message
    recipe["models"] = [{"model": str(family.base.path)}]
    message = refused(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    assert "names no expert beside the base model" in message


def test_a_lora_that_is_not_there(family: Family, tmp_path: Path) -> None:
    recipe = change(family, model={"model": f"{family.base.path}+{tmp_path}/lora"})
    message = refused(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    assert message == f"adapter folder '{tmp_path}/lora' not found"


def test_another_architecture_before_weights_are_opened(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("weights were opened")

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", refuse)
    monkeypatch.setattr(LoaderCache, "get", refuse)
    config = llama_config(num_hidden_layers=3)
    state = random_state(config, 0)
    scorefile.write(scores_for(state, add(state, state), config), family.paths[1])
    message = refused(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert "expert1.safetensors is of another architecture than the base model" in message


def test_wrong_scores_are_found_before_merging(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("merging began")

    monkeypatch.setattr("mergekit_wp.merging.merge.run_merge", refuse)
    family.paths.reverse()
    message = refused(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert "these are scores of another expert, base, revision or shifted layers" in message


def test_a_wrong_tensor_that_the_sample_missed_is_found_while_merging(
    family: Family, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    state = family.experts[0].state
    state[name] = state[name] * 1.5
    save_file(state, family.experts[0].path / "model.safetensors", metadata={"format": "pt"})
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    message = refused(recipe, tmp_path / "new" / "out")
    assert message.startswith(f"tensor {name} of ")


def test_shifted_slices(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    sources = [model | {"layer_range": [1, 2]} for model in recipe.pop("models")]
    sources.append({"model": str(family.base.path), "layer_range": [1, 2]})
    recipe["slices"] = [{"sources": sources}]
    message = refused(write(recipe, tmp_path / "recipe.yml"), tmp_path / "out")
    assert "weight_patching needs layers to keep their numbers" in message


def test_targets_that_cannot_be(family: Family, tmp_path: Path) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    assert "is a file" in refused(recipe, recipe)
    assert "is an input of the merge" in refused(recipe, family.base.path)


def test_files_of_others_are_refused_before_anything_is_merged(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with monkeypatch.context() as patched:
        patched.delattr("mergekit_wp.merging.merge.run_merge")
        assert f"{out / 'README.md'} exists already; add " in refused(recipe, out)
    assert (out / "README.md").read_text() == "mine"
    done(recipe, out, "--no-write-model-card")
    assert (out / "README.md").read_text() == "mine"
    done(recipe, out, "--overwrite")
    assert (out / "README.md").read_text() != "mine"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type
) -> None:
    def stop(config: object, out: str, **_: object) -> None:
        os.makedirs(out)
        Path(out, "model-1.safetensors").write_text("half")
        raise interruption

    monkeypatch.setattr("mergekit_wp.merging.merge.run_merge", stop)
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    before = tree(tmp_path)
    assert invoke(recipe, tmp_path / "new" / "out").exception is not None
    assert tree(tmp_path) == before


def test_from_the_command_line(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    arguments = ["merge", str(recipe), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    capsys.readouterr()
    family.paths[0].unlink()
    with pytest.raises(SystemExit) as failed:
        main(arguments)
    assert failed.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_from_python(family: Family, tmp_path: Path) -> None:
    """A recipe in memory, with paths that are paths; and one made of score files."""
    wanted = done(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    ensure_registered()
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    models = [
        {"model": str(expert.path), "parameters": {"scores": path}}
        for expert, path in zip(family.experts, family.paths, strict=True)
    ]
    merge(family.recipe() | {"models": models}, tmp_path / "mine", options, write_card, print)
    found = load_file(tmp_path / "mine" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    assert "weight_patching" in (tmp_path / "mine" / "README.md").read_text()
    for checkpoint, path in zip(family.experts, family.paths, strict=True):
        file = scorefile.read(path)
        of = {"expert": checkpoint, "base": family.base}
        names = {
            key: getattr(file.manifest, key).model_copy(update={"reference": str(model.path)})
            for key, model in of.items()
        }
        scorefile.write(replace(file, manifest=file.manifest.model_copy(update=names)), path)
    merge(recipe_of(family.paths), tmp_path / "of", options, write_card, print)
    found = load_file(tmp_path / "of" / "model.safetensors")
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="recipe in memory: model .* has no 'scores'"):
        bare = [{"model": str(expert.path)} for expert in family.experts]
        merge(family.recipe() | {"models": bare}, tmp_path / "no", options, write_card, print)
    with pytest.raises(UserError, match="recipe in memory cannot be written as YAML"):
        merge(family.recipe() | {"dtype": object()}, tmp_path / "no", options, write_card, print)
    with pytest.raises(UserError, match="needs a score file for every expert"):
        recipe_of([])
    assert tree(tmp_path) == before


def test_a_stored_dtype_is_not_a_mistake(tmp_path: Path) -> None:
    """float32 checkpoints with tiny task vectors, merged in bfloat16."""
    config = llama_config()
    family = Family.make(tmp_path, config, n_experts=1)
    base = family.base.state
    small = add(base, random_state(config, 5, 1e-5))
    file = scores_for(base, small, config)
    scorefile.write(replace(file), family.paths[0])
    save_file(small, family.experts[0].path / "model.safetensors", metadata={"format": "pt"})
    recipe = write(family.recipe(dtype="bfloat16"), tmp_path / "recipe.yml")
    assert done(recipe, tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("error", [KeyError, RuntimeError])
def test_a_bug_of_ours_is_no_mistake_of_the_recipe(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """mergekit's planner calls our method, whose bugs must not be taken for its refusals."""

    def broken(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr("mergekit_wp.merging.method.check_fit", broken)
    result = invoke(write(family.recipe(), tmp_path / "recipe.yml"), tmp_path / "out")
    assert type(result.exception) is error and "ours" in str(result.exception)
