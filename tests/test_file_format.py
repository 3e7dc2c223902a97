"""docs/file-format.md is enough to read, check and merge by what our commands write."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.numpy import load_file, save_file

from mergekit_wp import terms
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.cli import main
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.files.manifest import Manifest
from tests.format_reader import (
    belongs,
    channels,
    fine,
    merged,
    read,
    scores,
    share_gates,
    weights_sha256,
)
from tests.models import make_model, perturbed, save, write_prompts

ensure_registered()
PAGE = Path(__file__).parents[1] / "docs" / "file-format.md"
NAMES = ("inst", "math")
#: folders of score files
MERGED_BY = ("share", "component", "channel")


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score files of two experts by our commands, scored and fitted; and merges by them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("format")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    few, every, models = ("--max-new-tokens", 2), [], []
    for seed, name in enumerate(NAMES, start=1):
        save(perturbed(base, seed=seed), root / name, torch.float32)
        prompts = write_prompts(root / f"{name}.jsonl", 4)
        out = root / "share" / f"{name}.safetensors"
        every += ["--prompts", f"{name}={prompts}"]
        pair = (root / "base", root / name, "--prompts", prompts, "--estimand", "share")
        run("score", *pair, "--out", out, *few)
        models.append({"model": str(root / name), "parameters": {"scores": str(out)}})
    recipe = {
        "merge_method": "weight_patching",
        "base_model": str(root / "base"),
        "models": models,
        "parameters": {"fusion": "share", "power": 0.5, "lambda": 0.75},
        "dtype": "float32",
    }
    (root / "share" / "recipe.yml").write_text(yaml.safe_dump(recipe))
    for granularity in ("component", "channel"):
        gates = ("--steps", 4, "--unguarded", "--granularity", granularity, *few)
        run("fit", root / "share" / "recipe.yml", *every, "--out", root / granularity, *gates)
    for folder in MERGED_BY:
        run("merge", root / folder / "recipe.yml", root / f"by-{folder}", "--quiet")
    contrasts = write_prompts(root / "contrasts.jsonl", 4, contrast=True)
    pair = (root / "base", root / "inst", "--prompts", contrasts, "--estimand", "share,gain")
    run("score", *pair, "--out", root / "alone.safetensors", *few)
    return root


def test_a_score_file_is_read_and_adds_up(world: Path) -> None:
    manifest, tensors = read(world / "alone.safetensors")
    assert manifest["anchor"] is not None and "gain/anchor/neuron" in tensors
    rows = [json.loads(line) for line in (world / "contrasts.jsonl").read_text().splitlines()]
    content = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    assert manifest["prompts_sha256"] == hashlib.sha256(content.encode()).hexdigest()
    hashes = [hashlib.sha256(row["prompt"].strip().encode()).hexdigest() for row in rows]
    assert manifest["prompt_digests"] == [digest[:16] for digest in hashes]
    for criterion in manifest["criteria"]:
        parts = fine(manifest, scores(tensors, f"share/{criterion}"))
        total = sum(part.sum() for part in parts.values())
        assert total == pytest.approx(manifest["completeness"][f"share/{criterion}"], abs=1e-5)


def test_a_file_knows_its_models(world: Path) -> None:
    manifest, tensors = read(world / "alone.safetensors")
    norms = tensors["delta_norm"]
    assert belongs(manifest, norms, world / "base", world / "inst")
    assert not belongs(manifest, norms, world / "base", world / "math")
    assert not belongs(manifest, norms, world / "math", world / "inst")
    weights = load_file(world / "inst" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.1)
    (world / "changed").mkdir()
    save_file(weights, world / "changed" / "model.safetensors")
    assert not belongs(manifest, norms, world / "base", world / "changed")


def test_a_company_names_its_weights(world: Path) -> None:
    files = [read(world / "channel" / f"{name}.safetensors") for name in NAMES]
    (manifest, _), (other, _) = files
    assert manifest["company"] == other["company"]
    for e, (name, (own, tensors)) in enumerate(zip(NAMES, files, strict=True)):
        assert manifest["company"][e]["weights_sha256"] == weights_sha256(world / name)
        assert manifest["company"][e]["reference"] == str(world / name)
        assert belongs(own, tensors["delta_norm"], world / "base", world / name)


def test_a_fit_is_the_same_in_all_files(world: Path) -> None:
    (one, _), (two, _) = (read(world / "channel" / f"{name}.safetensors") for name in NAMES)
    assert one["fit"] == two["fit"]
    fit = one["fit"]
    assert [moment["step"] for moment in fit["history"]] == list(range(5))
    first, best = (fit["history"][step]["judged"] for step in (0, fit["best_step"]))
    for member in one["company"]:
        assert 0 <= best[member["behavior"]]["answers"] <= 1
        assert best[member["behavior"]]["kl"] <= first[member["behavior"]]["kl"]
    scales = {m["behavior"]: m["scale"]["kl"]["base"] for m in (one, two)}
    for member in one["company"]:
        left = best[member["behavior"]]["kl"] / -scales[member["behavior"]]
        assert member["recovery"] == pytest.approx(1 - left, rel=1e-6)
    alone, _ = read(world / "alone.safetensors")
    assert "fit" not in alone and alone["company"] is None


@pytest.mark.parametrize("by", MERGED_BY)
def test_merges_by_the_specification_are_ours(world: Path, by: str) -> None:
    experts = [world / name for name in NAMES]
    files = [read(world / by / f"{name}.safetensors") for name in NAMES]
    manifest = files[0][0]
    if by == "share":
        gates = share_gates([fine(m, scores(t, "share/kl")) for m, t in files], 0.5)
        gates = [{kind: 0.75 * gate for kind, gate in own.items()} for own in gates]
    elif by == "channel":
        gates = [channels(m, t) for m, t in files]
    else:
        gates = [fine(m, scores(t, "path/kl")) for m, t in files]
    ours = load_file(world / f"by-{by}" / "model.safetensors")
    found = merged(manifest, gates, world / "base", experts)
    base = load_file(world / "base" / "model.safetensors")
    assert ours.keys() == found.keys()
    assert any(np.abs(found[name] - base[name]).max() > 0.01 for name in found)
    for name, weight in found.items():
        np.testing.assert_allclose(weight, ours[name], rtol=0, atol=1e-6, err_msg=name)


def keys_of(model: type[BaseModel]) -> set[str]:
    """Every key of a manifest and of the objects in it."""
    found: set[str] = set()
    for key, field in model.model_fields.items():
        found.add(key)
        pending: list[Any] = [field.annotation]
        while pending:
            part = pending.pop()
            if isinstance(part, type) and not isinstance(part, types.GenericAlias):
                if issubclass(part, BaseModel):
                    found |= keys_of(part)
            else:
                pending += typing.get_args(part)
    return found


def test_the_specification_names_every_key() -> None:
    assert {"weights_sha256", "history", "limit", "answers", "recovery"} <= keys_of(Manifest)
    page = PAGE.read_text()
    for key in sorted(keys_of(Manifest)):
        assert f"`{key}`" in page, key


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def test_the_specification_names_keys_where_they_stand() -> None:
    """An object's keys are named beside the key that holds it."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for model in (Manifest, Fit):
        for name, info in model.model_fields.items():
            beside = "".join("|".join(row) for row in rows if f"`{name}`" in row[1])
            for inner in models_in(info.annotation):
                for key in set(inner.model_fields) - {"format_version"} if inner is not Fit else ():
                    assert f"`{key}`" in beside, f"{name}: {key}"


def test_the_specification_names_every_value() -> None:
    page = PAGE.read_text()
    named = (terms.Estimand, terms.BuiltInCriterion, terms.ScoringMethod, terms.SetName)
    for choice in (*named, terms.Direction, terms.Kind, terms.GateGranularity):
        for value in typing.get_args(choice):
            assert f"`{value}`" in page, value
