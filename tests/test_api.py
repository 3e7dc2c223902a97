"""The Python API: the same numbers as the commands, nothing written unasked, one-line mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_wp as wp
from mergekit_wp.cli import cli
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.prompts import Prompt, PromptBatch
from mergekit_wp.results import Scores
from tests.joint_world import NAMES, make_world
from tests.killing import contents
from tests.merging import Family, llama_config, reference
from tests.models import make_model, perturbed, save

torch.set_num_threads(1)
TEXTS = ["abcd", "bcd", "cab", "dd"]
QUICK: dict[str, Any] = {"share_steps": 2, "max_new_tokens": 2, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of one base with their prompts, and a recipe; and a third by itself."""
    root = make_world("llama-tied", tmp_path_factory.mktemp("api"))
    save(perturbed(make_model("llama-tied"), 0.2), root / "expert")
    return root


@pytest.fixture(scope="module")
def scores(world: Path) -> Scores:
    return wp.score(str(world / "base"), str(world / "expert"), prompts=TEXTS, **QUICK)


def test_no_name_costs_anything_before_it_is_asked_for() -> None:
    code = "import mergekit_wp as wp, sys; dir(wp); wp.UserError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert all(getattr(wp, name) is not None for name in dir(wp))
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = wp.scores  # type: ignore[attr-defined]


def test_scores_are_those_of_the_command_and_nothing_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(world)
    quiet = wp.score(str(world / "base"), str(world / "expert"), prompts=TEXTS, **QUICK)
    assert not list(tmp_path.iterdir()) and contents(world) == before
    assert capfd.readouterr() == ("", "")
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    line = (
        f"score {world}/base {world}/expert --prompts p.jsonl --out s.safetensors --share-steps 2"
    )
    done = CliRunner().invoke(cli, [*line.split(), "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    theirs = wp.load_scores("s.safetensors")
    assert quiet.file.tensors.keys() == theirs.file.tensors.keys()
    for key, tensor in quiet.file.tensors.items():
        assert torch.equal(tensor, theirs.file.tensors[key]), key
    quiet.save("own.safetensors")
    assert wp.load_scores("own.safetensors").manifest == quiet.manifest
    with pytest.raises(wp.UserError, match="own.safetensors exists already; .*overwrite=True"):
        quiet.save("own.safetensors")
    quiet.save("own.safetensors", overwrite=True)


def test_prompts_may_be_texts_chats_objects_or_a_dataset(world: Path, scores: Scores) -> None:
    class Dataset:
        """As those of `datasets`: iterable, rows are mappings."""

        def __iter__(self) -> Any:
            return iter([{"prompt": text, "response": None} for text in TEXTS])

    sides = str(world / "base"), str(world / "expert")
    for prompts in ([{"prompt": text} for text in TEXTS], Dataset()):
        again = wp.score(*sides, prompts=prompts, **QUICK)
        assert again.file.digest() == scores.file.digest()
    chat = [{"role": "user", "content": "ab"}]
    with pytest.raises(wp.UserError, match="chat template"):
        wp.score(*sides, prompts=[chat, chat], **QUICK)


def test_scores_are_ranked_framed_and_drawn(scores: Scores) -> None:
    share = scores.tensor("share", "kl", "head")
    assert share.shape == (scores.manifest.n_layers, scores.manifest.n_heads)
    [first, *_] = scores.top(5, estimand="share", kind="head")
    assert first.score == float(share.max()) and first.name.endswith(f"head {first.index}")
    fine = scores.top(10_000, estimand="share")
    total = sum(row.score for row in fine)
    assert total == pytest.approx(scores.manifest.completeness["share/kl"], abs=1e-5)
    assert len({row.name for row in fine}) == len(fine), "no weight stands twice"
    frame = scores.frame()
    heads = frame[(frame.estimand == "share") & (frame.kind == "head")]
    table = heads.pivot(index="layer", columns="index", values="score").to_numpy()
    np.testing.assert_array_equal(table, share.numpy())
    assert frame.score.is_monotonic_decreasing
    picture = scores.plot()
    assert picture._repr_png_().startswith(b"\x89PNG") and repr(picture) == "Picture()"
    assert "share by kl" in repr(scores)


def test_a_callers_criterion(world: Path) -> None:
    def answered(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
        chosen = torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None])[:, 0]
        return torch.stack([chosen[batch.owners == i].mean() for i in range(batch.size)])

    sides = str(world / "base"), str(world / "expert")
    own = wp.score(*sides, prompts=TEXTS, criterion=["logprob", answered], **QUICK)
    assert own.manifest.criteria == ("logprob", "answered")
    for kind in ("head", "neuron"):
        ours, theirs = (own.tensor("gain", c, kind) for c in ("answered", "logprob"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_fitted_experts_are_merged_and_fused_alike(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and by mergekit, from Python and by commands."""
    monkeypatch.chdir(tmp_path)
    experts = {name: str(world / name) for name in NAMES}
    prompts = {name: str(world / f"{name}.jsonl") for name in NAMES}
    assert wp.score_together is wp.fit
    options = {"steps": 2, "prompts_a_step": 2, "guards": [TEXTS], "progress": False}
    found = wp.fit(str(world / "base"), experts, prompts=prompts, **options)
    assert not list(tmp_path.iterdir())
    assert list(found) == list(NAMES) == list(found.recoveries)
    wp.merge(found, "merged")
    states = [load_file(world / name / "model.safetensors") for name in ("base", *NAMES)]
    fused = wp.fuse(states[0], dict(zip(NAMES, states[1:], strict=True)), found, fusion="path")
    merged = load_file("merged/model.safetensors")
    assert fused.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, fused[name].to(tensor.dtype), rtol=0, atol=1e-6)
    assert "answers reproduced" in repr(found)
    assert Path("merged/README.md").exists()
    assert {path.stem for path in Path("merged/scores").iterdir()} == set(NAMES)
    recipe = found.save("saved")
    with pytest.raises(wp.UserError, match="exists already; .*overwrite=True"):
        found.save("saved")
    found.save("saved", overwrite=True)
    assert yaml.safe_load(recipe.read_text())["parameters"] == {"fusion": "path"}
    done = CliRunner().invoke(cli, ["merge", "saved/recipe.yml", "again", "--quiet"])
    assert done.exit_code == 0, done.output
    for name, tensor in load_file("again/model.safetensors").items():
        assert torch.equal(tensor, merged[name])
    one, other = (f"saved/{name}.safetensors" for name in NAMES)
    for line in (f"inspect {one}", f"plot {one} --out page.html", f"stability {one} {other}"):
        done = CliRunner().invoke(cli, line.split())
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"fusion": "gate", "lambda": 0.7},
        {"fusion": "winner", "weight": {"a": 1.5, "b": 0.5}},
        {"power": 2.0, "density": 0.5, "granularity": "tensor"},
    ],
)
def test_fused_states_are_the_definitions(tmp_path: Path, given: dict[str, Any]) -> None:
    family = Family.make(tmp_path, llama_config(), dtype=torch.float64)
    states = [expert.state for expert in family.experts]
    own = {name: Scores(file) for name, file in zip("ab", family.files, strict=True)}
    before = {name: tensor.clone() for name, tensor in family.base.state.items()}
    found = wp.fuse(family.base.state, dict(zip("ab", states, strict=True)), own, **given)
    weight, density = given.get("weight", {"a": 1.0, "b": 1.0}), given.get("density", 1.0)
    for name, tensor in before.items():
        assert torch.equal(family.base.state[name], tensor), "the base is not touched"
    want = reference(
        before,
        states,
        family.files,
        weights=list(weight.values()),
        densities=[density, density],
        fusion=given.get("fusion", "share"),
        power=given.get("power", 0.5),
        lam=given.get("lambda", 1.0),
        granularity=given.get("granularity", "component"),
    )
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-9, atol=1e-9)


def test_a_comparison(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = [
        {"prompt": p, "answer": a, "split": "test", "checker": "contains"}
        for p, a in (("abc", "a"), ("cab", "d"))
    ]
    Path("items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    experts = {name: world / name for name in NAMES}
    prompts = {name: world / f"{name}.jsonl" for name in NAMES}
    together = wp.fit(
        world / "base", experts, prompts=prompts, steps=1, unguarded=True, progress=False
    )
    found = wp.compare(
        together,
        tasks=["items.jsonl"],
        methods=["weight_patching", "linear"],
        untuned=True,
        max_new_tokens=2,
        progress=False,
    )
    assert "linear" in found.table() and found.report().startswith("<!doctype html>")
    assert "linear (untuned)" in list(found.frame()["name"])
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: wp.score(w / "base", w / "nowhere", prompts=TEXTS), "nowhere"),
        (lambda w: wp.score(w / "base", w / "expert", prompts=[]), "'prompts' holds no prompts"),
        (lambda w: wp.score(w / "base", w / "expert", prompts=[3]), "^prompt 1: .*a list of mess"),
        (lambda w: wp.score(w / "base", w / "expert", prompts=TEXTS, kind="head"), "option kind"),
        (lambda w: wp.score(w / "base", w / "expert", prompts=TEXTS, dtype="int8"), "^dtype: "),
        (lambda w: wp.fit(w / "base", prompts={}), "expected a base and its experts by name"),
        (
            lambda w: wp.fit(w / "base", {"x": w / "expert"}, prompts={"y": TEXTS}),
            "prompts of 'y': 'y' is no expert of this fit; it has x$",
        ),
        (
            lambda w: wp.fit(w / "base", [w / "expert"], prompts={"x": TEXTS}),
            r"^experts are given without names, as \[.*; expected them by names of your choice",
        ),
        (
            lambda w: wp.fit(w / "base", {"x": "e", "y": "f"}, prompts="p.jsonl"),
            "^prompts: 'p.jsonl' names no expert; write EXPERT=SOURCE",
        ),
        (
            lambda w: wp.fit("none", {"x": "none"}, prompts={"x": TEXTS}, start="scores"),
            "^start=scores begins with the gates by which a recipe merges, and base and experts "
            "are given without one; give such a recipe in their place, as the recipe.yml of",
        ),
        (
            lambda w: wp.fit(w / "base", {"x": w / "expert"}, prompts={"x": TEXTS}, batch_size=1),
            "^batch_size does not go with a fit; give prompts_a_step",
        ),
        (lambda w: wp.load_scores(w / "recipe.yml"), "recipe.yml"),
        (lambda w: wp.merge([], w / "out"), "needs a score file for every expert"),
        (lambda w: wp.fuse({}, {"a": {}}, {}), "experts a and scores of ; give one"),
        (lambda w: wp.fuse({}, {}, {}, fusion="sum"), "'fusion' must be one of share"),
        (
            lambda w: wp.fuse({}, {}, {}, power=1, fusion="path"),
            "^'power' does nothing under fusion 'path', only under share",
        ),
        (lambda w: wp.fuse({}, {}, {}, powers=1), "no parameter 'powers'; there are fusion, power"),
    ],
)
def test_bad_input(world: Path, call: Any, message: str) -> None:
    with pytest.raises(wp.UserError, match=message) as refused:
        call(world)
    assert "\n" not in str(refused.value) and "--" not in str(refused.value)


def test_what_a_fit_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One source as the only expert's prompts or as the only guard, and a number as the start."""
    asked: list[FitRequest] = []
    monkeypatch.setattr("mergekit_wp.api._fit", lambda request, _: asked.append(request) or {})
    source = Path("p.jsonl?split=train")
    wp.fit("b", {"x": "e"}, prompts=source, guards="g.jsonl", start=0.3, progress=False)
    wp.fit(recipe=("b", "e"), prompts=(str(source),), guards=[source], start="0.3", progress=False)
    wp.fit("b", {"x": "e"}, prompts=["x=p.jsonl"], guards=["p.jsonl", ["a"]], progress=False)
    assert [request.prompts for request in asked] == [
        (("x", source),),
        (("e", source),),
        (("x", Path("p.jsonl")),),
    ]
    assert [request.guards for request in asked] == [
        (Path("g.jsonl"),),
        (source,),
        (Path("p.jsonl"), (Prompt(prompt="a"),)),
    ]
    assert [request.start for request in asked] == ["0.3", "0.3", "0.5"]


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    family = Family.make(tmp_path, llama_config(), n_experts=1)
    own, state = {"a": Scores(family.files[0])}, dict(family.experts[0].state)
    name = "model.layers.0.self_attn.q_proj.weight"
    for changed, message in (
        ({k: v for k, v in state.items() if k != name}, f"'a' has no tensor {name}"),
        (state | {name: state[name][:1]}, f"tensor {name} is .* in expert 'a'"),
        (state | {name: state[name] * 3}, "these are scores of another expert"),
    ):
        with pytest.raises(wp.UserError, match=message):
            wp.fuse(family.base.state, {"a": changed}, own)
