"""The zoo, end to end: real experts, real interference, every step by its public interface."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from benchmarks.zoo.evaluate import evaluate
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.model_names import file_names
from mergekit_wp.prompts.location import Location
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.test_scoring import Quiet

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "benchmarks" / "zoo" / "checkpoints"
EXPERTS = ("inst", "math", "sort")


def scored(expert: str, out: Path, **options) -> ScoreFile:
    torch.set_num_threads(1)
    request = ScoreRequest(
        base=str(ZOO / "base"),
        expert=str(ZOO / expert),
        prompts=ZOO / "prompts" / f"{expert}.jsonl",
        out=out,
        criterion=("kl",),
        **options,
    )
    return score(request, Quiet())


@pytest.mark.parametrize("expert", EXPERTS)
def test_first_order_against_exact(tmp_path, expert) -> None:
    options = {"estimand": ("gain",), "kinds": ("head", "neuron"), "max_prompts": 32}
    first = scored(expert, tmp_path / "first.safetensors", exact_budget=0, verify=40, **options)
    neurons = first.manifest.fidelity["gain/kl/neuron"]
    assert neurons.method == "second-order"
    assert neurons.pearson > 0.95
    assert first.manifest.fidelity["gain/kl/head"].verified_top == 16
    assert first.manifest.fidelity["gain/kl/head"].pearson > 0.9


def recipe(method: str, per_model: dict[str, dict[str, object]]) -> MergeConfiguration:
    models = [{"model": str(ZOO / e), "parameters": p} for e, p in per_model.items()]
    return MergeConfiguration.model_validate(
        {"merge_method": method, "base_model": str(ZOO / "base"), "models": models}
        | {"dtype": "bfloat16"}
    )


def relative_accuracy(config: MergeConfiguration, out: Path, own: dict[str, float]) -> float:
    run_merge(config, str(out), MergeOptions(quiet=True))
    accuracy = evaluate(out, ZOO / "eval")
    return sum(accuracy[e] / own[e] for e in EXPERTS) / len(EXPERTS)


@pytest.mark.slow
def test_share_fusion_beats_ties_on_three_experts(tmp_path) -> None:
    ensure_registered()
    own = {e: evaluate(ZOO / e, ZOO / "eval")[e] for e in EXPERTS}
    scores = {}
    for e in EXPERTS:
        result = scored(e, tmp_path / f"{e}.safetensors", estimand=("share",))
        assert result.manifest.completeness["share/kl"] == pytest.approx(1, abs=0.02)
        scores[e] = {"scores": str(tmp_path / f"{e}.safetensors")}
    ours = relative_accuracy(recipe("weight_patching", scores), tmp_path / "ours", own)
    ties = [
        relative_accuracy(
            recipe("ties", {e: {"weight": 1.0, "density": density} for e in EXPERTS}),
            tmp_path / f"ties{density}",
            own,
        )
        for density in (0.5, 1.0)
    ]
    print(f"three experts, relative accuracy: share {ours:.3f}, TIES {ties[0]:.3f}, {ties[1]:.3f}")
    assert ours > max(ties) + 0.1


def test_recipes_for_the_hub_are_read_and_say_when_their_ids_were_looked_up() -> None:
    for path in sorted((ROOT / "recipes" / "hub").glob("*.yml")):
        text = path.read_text()
        assert re.search(r"looked up 2026-\d\d-\d\d", text) and "not run this recipe" in text
        experts = Experts.read(path)
        names = dict(zip(file_names(experts.models), experts.models, strict=True))
        assert len(names) == 3 and all(re.fullmatch(r"[\w.-]+/[\w.-]+", m) for m in names.values())
        for source in re.findall(r'--prompts "([^"]+)"', text):
            name, _, place = source.partition("=")
            assert name in names and Location.parse(place).kind == "hub"


def test_every_recipe_names_the_zoo_and_its_scores() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yml")):
        config = yaml.safe_load(path.read_text())
        MergeConfiguration.model_validate(config)
        for model in [config["base_model"], *(m["model"] for m in config["models"])]:
            assert (ROOT / model / "model.safetensors").exists(), (path, model)
        folder = "scores/fitted" if "fitted" in path.stem else "scores"
        for model in config["models"]:
            expected = f"{folder}/{Path(model['model']).name}.safetensors"
            assert model["parameters"].get("scores", expected) == expected
