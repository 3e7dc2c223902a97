"""Fitting gates: planted truth, guards, starting points, resuming, merges by the file."""

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
from mergekit_wp.files import gatesfile
from mergekit_wp.files.gatesfile import GatesFile
from mergekit_wp.runs.journal import Journal
from mergekit_wp.terms import FINE_KINDS
from tests.circuit import CONSTANT, build
from tests.fitting import divergence, fitted, layout_of, load, merge, merged
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
    out = tmp_path / "gates.safetensors"
    file = fitted(tmp_path, out, ("west", "east"), steps=60, held_out=0)
    west, theirs = (file.gates(e)["neuron"] for e in (0, 1))
    assert [float(west[layer, j]) for layer, j, _, _ in poison] == pytest.approx([0, 0], abs=0.05)
    assert float(west[own[0], own[1]]) > 0.8 and float(theirs[east[0], east[1]]) > 0.8
    last, first = file.manifest.history[-1].fitted, file.manifest.history[0].fitted
    assert last is not None and first is not None
    assert min(last.values()) > 0.95 > first["east"]


def test_merging_by_the_file(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out)
    manifest = file.manifest
    assert len(manifest.history) == 7 and manifest.start == "0.5"
    assert [m.held_out is not None for m in manifest.history] == [True, *[False] * 4, True, True]
    first, last = manifest.history[0].held_out, manifest.history[-1].held_out
    assert first is not None and last is not None and sum(last.values()) > sum(first.values())
    _, layout = layout_of(world)
    flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
    want = dict(merged(world, layout, flat).named_parameters())
    found = merge(tmp_path / "gates.yml", tmp_path / "by-mergekit")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, want[name].detach(), rtol=1e-9, atol=1e-9)
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "gates.yml"), str(tmp_path / "by-command")]
    )
    assert done.exception is None, done.exception
    again = load_file(tmp_path / "by-command" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    copied = yaml.safe_load((tmp_path / "by-command" / "mergekit_config.yml").read_text())
    assert copied["parameters"]["gates"] == "scores/gates.safetensors"
    assert (tmp_path / "by-command" / "scores" / "gates.safetensors").is_file()
    card = (tmp_path / "by-command" / "README.md").read_text()
    assert "gates fitted by gradient" in card and "## What each expert contributed" in card


def test_inspect_and_plot(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates.safetensors"
    file = fitted(world, out)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments))
        assert done.exception is None, done.exception
        return done.output

    shown = run("inspect", str(out), "--top", "3")
    assert "gates of 2 experts" in shown and "after 0 steps, recovered on held-out" in shown
    assert shown.count("highest: ") == 2
    whole = json.loads(run("inspect", str(out), "--json"))
    n = sum(gates.numel() for gates in file.gates(0).values())
    assert len(whole["gates"]) == 2 * n
    for entry in whole["gates"]:
        gates = file.gates(NAMES.index(Path(entry["expert"]).name))[entry["kind"]]
        if entry["kind"] != "tensor":
            assert entry["gate"] == pytest.approx(float(gates[entry["layer"], entry["index"]]))
    run("plot", str(out), "--out", str(tmp_path / "g.png"))
    run("plot", str(out), "--out", str(tmp_path / "g.html"))
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "g.html").read_text()
    assert page.count("<svg") == 2 + 2 * 4 and "Objective" in page
    for arguments in (
        ("inspect", str(out), "--kind", "head"),
        ("plot", str(out), "--trace", "x.json", "--out", str(tmp_path / "g.html")),
    ):
        done = CliRunner().invoke(cli, list(arguments))
        assert isinstance(done.exception, UserError) and "is a gates file" in str(done.exception)


def test_all_ones_is_task_arithmetic(world: Path, tmp_path: Path) -> None:
    file = fitted(world, tmp_path / "gates.safetensors", steps=1)
    tensors = {
        key: torch.ones_like(t) if key.startswith("gate/") else t for key, t in file.tensors.items()
    }
    gatesfile.write(GatesFile(file.manifest, tensors), tmp_path / "gates.safetensors")
    ours = merge(tmp_path / "gates.yml", tmp_path / "ours")
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
    free = fitted(world, tmp_path / "free.safetensors", **options)
    options |= {"guards": (tmp_path / "plain.jsonl",)}
    guarded = fitted(world, tmp_path / "kept.safetensors", guard_weight=0.5, **options)
    harder = fitted(world, tmp_path / "harder.safetensors", guard_weight=4.0, **options)
    assert [g.behavior for g in guarded.manifest.guards] == ["plain"]
    assert harder.manifest.guard_weight == 4.0
    base = load(world / "base")
    _, layout = layout_of(world)
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"response": "ab"}) + "\n" for line in kept)
    )

    def away(file: GatesFile) -> float:
        flat = torch.cat([file.gates(e)[k].double().flatten() for e in (0, 1) for k in FINE_KINDS])
        return divergence(merged(world, layout, flat), base, tmp_path / "answers.jsonl")

    assert away(guarded) < 0.7 * away(free)
    assert away(harder) < 0.7 * away(guarded)


def test_a_killed_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(world, tmp_path / "whole.safetensors")
    again, keep, saved = tmp_path / "again.safetensors", Journal.save, 0

    def killed(self: Journal, key: str, tensors: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:
            raise KeyboardInterrupt
        keep(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", killed)
        fitted(world, again)
    assert not again.exists()
    with pytest.raises(UserError, match=r"changed: steps \(6 -> 7\)"):
        fitted(world, again, steps=7)
    fitted(world, again)
    assert again.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_starting_points(world: Path, tmp_path: Path) -> None:
    first = fitted(world, tmp_path / "first.safetensors", steps=2, held_out=0)
    more = fitted(
        world,
        tmp_path / "more.safetensors",
        steps=1,
        held_out=0,
        rate=1e-9,
        start=str(tmp_path / "first.safetensors"),
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
    fitted(world, tmp_path / "scores.safetensors", start="scores", **options)
    by_gates = merge(tmp_path / "scores.yml", tmp_path / "by-gates")
    by_scores = merge(tmp_path / "recipe.yml", tmp_path / "by-scores")
    for name, tensor in by_scores.items():
        torch.testing.assert_close(by_gates[name], tensor, rtol=1e-6, atol=1e-6)
