"""Fitting gates: planted truth, guards, starting points, resuming, merges by the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.runs.journal import Journal
from mergekit_wp.terms import FINE_KINDS, SLICED_KINDS
from tests.circuit import CONSTANT, build
from tests.fitting import divergence, fitted, layout_of, load, merge, merged
from tests.gating import Gates
from tests.models import LETTERS, save
from tests.test_company import NAMES, make_world, write_recipe, write_task

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(request.param, tmp_path_factory.mktemp("fit"))


IS_B, OTHER = 5, 6


def skills(**neurons: tuple[int, int, int, float]) -> PreTrainedModel:
    """A model that answers 'x', and neurons (layer, index, what it reads) that say otherwise."""
    model = build(("neuron", 0, 3), ("head", 1, 2), ("neuron", 3, 5), noise=0.001)
    with torch.no_grad():
        model.model.embed_tokens.weight[LETTERS.index("b"), IS_B] += 4
        model.lm_head.weight[LETTERS.index("z"), OTHER] += 3
        for layer, j, reads, size in neurons.values():
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[j, reads] += 1
            mlp.up_proj.weight[j, CONSTANT] += 1
            mlp.down_proj.weight[4 if reads == 1 else OTHER, j] += size
    return model


def test_planted_poison_is_found(tmp_path: Path) -> None:
    """West's own neuron answers to 'a'; two others of it do nothing there, and undo east at 'b'."""
    own, poison = (1, 2, 1, 1.0), [(1, 7, IS_B, -1.5), (2, 4, IS_B, -1.5)]
    east = (1, 9, IS_B, 1.0)
    save(skills(), tmp_path / "base")
    save(skills(own=own, one=poison[0], two=poison[1]), tmp_path / "west")
    save(skills(own=east), tmp_path / "east")
    for name, letter, answer in (("west", "a", "y"), ("east", "b", "z")):
        texts = ["cd", "de", "fc", "gg", "hi", "k", "lm", "nop"]
        lines = [{"prompt": text + letter, "response": answer} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_recipe(tmp_path, ("west", "east"))
    out = tmp_path / "gates"
    file = fitted(tmp_path, out, ("west", "east"), steps=60, held_out=0)
    west, theirs = (file.gates(e)["neuron"] for e in (0, 1))
    assert [float(west[layer, j]) for layer, j, _, _ in poison] == pytest.approx([0, 0], abs=0.05)
    assert float(west[own[0], own[1]]) > 0.8 and float(theirs[east[0], east[1]]) > 0.8
    last, first = file.fit.history[-1].fitted, file.fit.history[0].fitted
    assert last is not None and first is not None
    assert min(last.values()) > 0.95 > first["east"]


def test_merging_by_the_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates"
    file = fitted(world, out)
    fit = file.fit
    assert len(fit.history) == 7 and fit.start == "0.5"
    assert [m.held_out is not None for m in fit.history] == [True, *[False] * 4, True, True]
    first, last = fit.history[0].held_out, fit.history[-1].held_out
    assert first is not None and last is not None and sum(last.values()) > sum(first.values())
    _, layout = layout_of(world)
    flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
    want = dict(merged(world, layout, flat).named_parameters())
    found = merge(tmp_path / "gates" / "recipe.yml", tmp_path / "by-mergekit")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, want[name].detach(), rtol=1e-9, atol=1e-9)
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "gates" / "recipe.yml"), str(tmp_path / "by-command")]
    )
    assert done.exception is None, done.exception
    again = load_file(tmp_path / "by-command" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    copied = yaml.safe_load((tmp_path / "by-command" / "mergekit_config.yml").read_text())
    for name, model in zip(NAMES, copied["models"], strict=True):
        assert model["parameters"]["scores"] == f"scores/{name}.safetensors"
        assert (tmp_path / "by-command" / "scores" / f"{name}.safetensors").is_file()
    card = (tmp_path / "by-command" / "README.md").read_text()
    assert "gates fitted by gradient" in card and "## What each expert contributed" in card


def test_inspect_and_plot(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates" / f"{NAMES[0]}.safetensors"
    file = fitted(world, tmp_path / "gates")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments))
        assert done.exception is None, done.exception
        return done.output

    shown = " ".join(run("inspect", str(out), "--top", "3").split())
    for step in (0, file.fit.best_step):
        values = file.fit.history[step].held_out
        assert values is not None
        said = ", ".join(f"{name} {values[name]:.2f}" for name in NAMES)
        assert f"after {step} steps, recovered on held-out prompts: {said}" in shown
    assert f"recovered by 'path': {said}" in shown and "gates fitted by gradient" in shown
    whole = json.loads(run("inspect", str(out), "--json"))
    assert whole["manifest"]["fit"] == file.fit.model_dump(mode="json")
    sliced = [x for x in whole["components"] if x["kind"] in SLICED_KINDS]
    assert len(sliced) == sum(file.gates(0)[kind].numel() for kind in SLICED_KINDS)
    for entry in sliced:
        gates = file.gates(0)[entry["kind"]]
        assert entry["score"] == pytest.approx(float(gates[entry["layer"], entry["index"]]))
    run("plot", str(out), "--out", str(tmp_path / "g.png"))
    run("plot", str(out), "--out", str(tmp_path / "g.html"))
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "g.html").read_text()
    assert "How the fit went" in page and "Recovery by step" in page
    assert "fusion: path" in page


def test_all_ones_is_task_arithmetic(world: Path, tmp_path: Path) -> None:
    file = fitted(world, tmp_path / "gates", steps=1)
    for name, own in zip(NAMES, file.files, strict=True):
        tensors = {
            key: torch.ones_like(t) if key.startswith("path/") else t
            for key, t in own.tensors.items()
        }
        path = tmp_path / "gates" / f"{name}.safetensors"
        scorefile.write(ScoreFile(own.manifest, tensors), path)
    ours = merge(tmp_path / "gates" / "recipe.yml", tmp_path / "ours")
    recipe = yaml.safe_load((world / "recipe.yml").read_text())
    recipe |= {"merge_method": "task_arithmetic", "dtype": "float64"}
    for model in recipe["models"]:
        model["parameters"] = {"weight": 1.0}
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(recipe))
    plain = merge(tmp_path / "plain.yml", tmp_path / "plain")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-9, atol=1e-9)


def test_a_guard_keeps_what_the_base_does(world: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "plain.jsonl", "zz")
    lines = (tmp_path / "plain.jsonl").read_text().splitlines()
    kept = [json.dumps({"prompt": json.loads(line)["prompt"][::-1] + "q"}) for line in lines]
    (tmp_path / "plain.jsonl").write_text("\n".join(kept) + "\n")
    options = {"steps": 20, "held_out": 0, "rate": 0.1, "max_new_tokens": 3}
    free = fitted(world, tmp_path / "free", **options)
    options |= {"guards": (tmp_path / "plain.jsonl",)}
    guarded = fitted(world, tmp_path / "kept", guard_weight=0.5, **options)
    harder = fitted(world, tmp_path / "harder", guard_weight=4.0, **options)
    assert [g.behavior for g in guarded.fit.guards] == ["plain"]
    assert harder.fit.guard_weight == 4.0
    base = load(world / "base")
    _, layout = layout_of(world)
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"response": "ab"}) + "\n" for line in kept)
    )

    def away(file: Gates) -> float:
        flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
        return divergence(merged(world, layout, flat), base, tmp_path / "answers.jsonl")

    assert away(guarded) < 0.7 * away(free)
    assert away(harder) < 0.7 * away(guarded)


def test_a_killed_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(world, tmp_path / "whole")
    again, keep, saved = tmp_path / "again", Journal.save, 0

    def killed(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        fitted(world, again)
    assert not list(again.glob("*.safetensors"))
    with pytest.raises(UserError, match=r"changed: steps \(6 -> 7\)"):
        fitted(world, again, steps=7)
    fitted(world, again)
    for name in NAMES:
        one, two = (folder / f"{name}.safetensors" for folder in (again, tmp_path / "whole"))
        assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_starting_points(world: Path, tmp_path: Path) -> None:
    first = fitted(world, tmp_path / "first", steps=2, held_out=0)
    more = fitted(
        world,
        tmp_path / "more",
        steps=1,
        held_out=0,
        rate=1e-9,
        start="scores",
        recipe=tmp_path / "first" / "recipe.yml",
    )
    for key, tensor in first.tensors.items():
        torch.testing.assert_close(more.tensors[key], tensor, rtol=1e-5, atol=1e-6)
    models = [
        {
            "model": str(world / name),
            "parameters": {"scores": str(tmp_path / f"{name}.safetensors")},
        }
        for name in NAMES
    ]
    for name in NAMES:
        done = CliRunner().invoke(
            cli,
            [
                *("score", str(world / "base"), str(world / name)),
                *("--prompts", str(world / f"{name}.jsonl"), "--estimand", "share"),
                *("--out", str(tmp_path / f"{name}.safetensors"), "--verify", "0"),
            ],
        )
        assert done.exception is None, done.exception
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(world / "base"),
        "models": models,
        "dtype": "float64",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    options = {"steps": 1, "held_out": 0, "rate": 1e-9, "recipe": tmp_path / "recipe.yml"}
    fitted(world, tmp_path / "scores", start="scores", **options)
    by_gates = merge(tmp_path / "scores" / "recipe.yml", tmp_path / "by-gates")
    by_scores = merge(tmp_path / "recipe.yml", tmp_path / "by-scores")
    for name, tensor in by_scores.items():
        torch.testing.assert_close(by_gates[name], tensor, rtol=1e-6, atol=1e-6)
