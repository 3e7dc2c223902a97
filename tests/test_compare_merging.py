"""Merges for the comparison are mergekit's own, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_wp.comparison import making, methods
from mergekit_wp.comparison.merging import EvaluationModel, merge_in_memory, merged_on_disk
from mergekit_wp.errors import UserError
from mergekit_wp.models.checkpoint import Checkpoint
from tests.merging import Family, llama_config, qwen_config

torch.set_num_threads(1)
PEERS = methods.peers(2)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2-untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = llama_config() if request.param == "llama-tied" else qwen_config()
    return Family.make(tmp_path_factory.mktemp(request.param), config)


def configure(family: Family, name: str, setting: methods.Setting):
    experts = [str(e.path) for e in family.experts]
    return methods.configuration(PEERS[name], setting, str(family.base.path), experts, "float32")


@pytest.mark.parametrize(
    "name", [n for n, m in PEERS.items() if n == m.merge_method and m.peer is None]
)
def test_in_memory_equals_mergekits_own_files(family: Family, name: str, tmp_path: Path) -> None:
    config = configure(family, name, PEERS[name].untuned)
    options = MergeOptions(quiet=True, random_seed=3)
    found = merge_in_memory(config, options)
    run_merge(config, str(tmp_path / "out"), options)
    want = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[n], want[n]) for n in want)
    if PEERS[name].draws:
        other = merge_in_memory(config, MergeOptions(quiet=True, random_seed=4))
        assert any(not torch.equal(found[n], other[n]) for n in want)


@pytest.mark.parametrize(
    "family", ["llama-tied", pytest.param("qwen2-untied", marks=pytest.mark.slow)], indirect=True
)
def test_every_setting_of_every_grid_merges_and_matters(family: Family) -> None:
    for method in PEERS.values():
        if method.aim or method.peer is not None or method.searched:
            continue
        merges = [
            merge_in_memory(configure(family, method.name, setting), MergeOptions(quiet=True))
            for setting in method.grid
        ]
        flat = [torch.cat([t.flatten() for t in tensors.values()]) for tensors in merges]
        for i, one in enumerate(flat):
            assert torch.isfinite(one).all()
            assert not any(torch.equal(one, other) for other in flat[:i]), method.name


def test_sums_by_their_formula(family: Family) -> None:
    base, experts = family.base.state, [e.state for e in family.experts]
    summed = merge_in_memory(
        configure(family, "task_arithmetic", {"weight": 0.3}), MergeOptions(quiet=True)
    )
    mixed = merge_in_memory(
        configure(family, "linear", {methods.BASE_WEIGHT: 0.5}), MergeOptions(quiet=True)
    )
    for name, start in base.items():
        want = start + sum(0.3 * (e[name] - start) for e in experts)
        torch.testing.assert_close(summed[name], want, atol=1e-5, rtol=1e-5)
        want = (0.5 * start + sum(e[name] for e in experts)) / 2.5
        torch.testing.assert_close(mixed[name], want, atol=1e-5, rtol=1e-5)


def test_the_evaluation_model_takes_exactly_its_weights(family: Family) -> None:
    base = Checkpoint(str(family.base.path))
    evaluation = EvaluationModel(base, torch.float32, "cpu")
    merged = merge_in_memory(configure(family, "ram", {}), MergeOptions(quiet=True))
    model = evaluation.load(merged)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, merged[name])
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is embedding) is family.config.tie_word_embeddings
    model = evaluation.load_checkpoint(base)
    assert torch.equal(model.model.norm.weight, family.base.state["model.norm.weight"])
    with pytest.raises(UserError, match=r"the merge has no tensor model.norm.weight"):
        evaluation.load({n: t for n, t in merged.items() if n != "model.norm.weight"})
    with pytest.raises(UserError, match="has a tensor other.weight"):
        evaluation.load(merged | {"other.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[3\]"):
        evaluation.load(merged | {"model.norm.weight": torch.zeros(3)})


def test_on_disk_is_removed_whatever_happens(family: Family, tmp_path: Path) -> None:
    config = configure(family, "ram", {})
    with merged_on_disk(config, MergeOptions(quiet=True), tmp_path) as folder:
        assert (folder / "model.safetensors").exists()
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(KeyError),
        merged_on_disk(config, MergeOptions(quiet=True), tmp_path) as folder,
    ):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_merge_that_cannot_be_loaded_leaves_no_folder(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(making, "load_folder", full)
    made: Any = object.__new__(making.Making)
    made.options = MergeOptions(quiet=True)
    made.plan = SimpleNamespace(eval_dtype=torch.float32, device="cpu")
    made.folder, made.in_memory = tmp_path / "results", False
    made.folder.mkdir()
    config = configure(family, "ram", {})
    with (
        pytest.raises(torch.OutOfMemoryError) as kept,  # and with it every frame it went through
        made.by_recipe(config, 0),
    ):
        raise AssertionError
    assert kept.value.__traceback__ is not None
    assert not list(made.folder.iterdir())


def test_our_settings_go_on_top_of_the_recipe(family: Family) -> None:
    from mergekit.config import MergeConfiguration

    recipe = MergeConfiguration.model_validate(family.recipe(parameters={"power": 2.0}))
    ours = methods.ours(recipe)
    made = methods.configuration(ours, {"lambda": 0.7}, "b", [], "float32", recipe)
    assert made.parameters == {"power": 2.0, "lambda": 0.7}
    assert recipe.parameters == {"power": 2.0}
    assert made.models == recipe.models
    own = family.recipe({"density": 0.5, "weight": 2.0}, {"density": 0.3})
    recipe = MergeConfiguration.model_validate(own)
    made = methods.configuration(ours, {"density": 0.9}, "b", [], "float32", recipe)
    assert made.parameters == {"density": 0.9}, "which mergekit looks at after the models' own"
    kept = [dict(model.parameters or {}) for model in made.models or []]
    assert [sorted(each) for each in kept] == [["scores", "weight"], ["scores"]]
    assert [m.parameters["density"] for m in recipe.models or [] if m.parameters] == [0.5, 0.3]
    for fusion in ("path", "gate"):
        other = MergeConfiguration.model_validate(family.recipe(parameters={"fusion": fusion}))
        assert {tuple(s) for s in methods.ours(other).grid} == {("lambda",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("- a", "expected METHOD: {PARAMETER: [VALUES]}"),
        ("nope: {a: [1]}", "'nope' is not compared; compared are"),
        ("ties+aim: {omega: [1]}", "'ties+aim' is not compared"),
        ("ties: [1]", "ties: expected {PARAMETER: [VALUES]}"),
        ("ties: {densty: [1]}", "ties has no parameter 'densty'; it has int8_mask"),
        ("ties: {density: 1}", "ties: density: expected a list of values"),
        ("iso_c: {lambda: [a]}", "iso_c: lambda: 'a': expected a number"),
        ("iso_c: {lambda: [true]}", "iso_c: lambda: True: expected a number"),
        ("fisher: {normalize: [1]}", "fisher: normalize: 1: expected true or false"),
        ("wudi: {stps: [1]}", "wudi has no parameter 'stps'; it has steps, rate"),
        ("task_arithmetic_per_expert: {weight: [x]}", "weight: 'x': expected a number"),
        ("ties: {density: []}", "ties: density: expected a list of values"),
    ],
)
def test_bad_grids(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        methods.read_grid(path, PEERS)


def test_grids(tmp_path: Path) -> None:
    path = tmp_path / "grid.yml"
    path.write_text("ties: {density: [0.1, 0.9]}\nlinear: {base_weight: [3]}")
    grids = methods.read_grid(path, PEERS)
    assert grids["ties"] == tuple({"weight": 1.0, "density": d, "lambda": 1.0} for d in (0.1, 0.9))
    assert grids["linear"] == ({"base_weight": 3},)
