"""What a command is said to cost, against what it does: FLOPs and bytes counted where they are."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest, NamedExperts
from mergekit_wp.mechanism.anchors import find_anchors
from mergekit_wp.mechanism.circuit import trace
from mergekit_wp.mechanism.request import AnchorRequest, TraceRequest, VerifyRequest
from mergekit_wp.mechanism.verify import verify
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.terms import Estimand
from tests.costs import real
from tests.models import EOS, LETTERS, make_model, perturbed, save, write_prompts
from tests.test_lora import make_adapter
from tests.test_scoring import Quiet

torch.set_num_threads(1)
#: grouped queries and tied weights; a head width of its own; two matrices in an MLP, its own layout
FAMILIES = ["llama-tied", "qwen3", "gpt2"]
#: counted is said, within
CLOSE = 0.08


def make_world(root: Path, family: str) -> Path:
    base = make_model(family)
    save(base, root / "base", torch.float32)
    for seed, name in enumerate(("east", "west"), 1):
        save(perturbed(base, 0.2, seed), root / name, torch.float32)
        write_prompts(root / f"{name}.jsonl", 6, response=True)
    write_prompts(root / "open.jsonl", 6, contrast=True)
    write_prompts(root / "guard.jsonl", 7)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in ("east", "west")],
        "dtype": "float32",
    }
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("costs"), request.param)


def one(world: Path, **options: Any) -> Callable[[Quiet], object]:
    settings: dict[str, Any] = {
        "base": str(world / "base"),
        "expert": str(world / "east"),
        "prompts": world / "east.jsonl",
        "device": "cpu",
        "batch_size": 3,
        "verify": 0,
        **options,
    }
    return lambda said: score(ScoreRequest(**settings), said)


def together(world: Path, **options: Any) -> Callable[[Quiet], object]:
    settings: dict[str, Any] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in ("east", "west")),
        "device": "cpu",
        "prompts_a_step": 2,
        **options,
    }
    return lambda said: fit(FitRequest(**settings), said)


ALONE: dict[str, dict[str, Any]] = {
    "share": {"estimand": ("share",), "criterion": ("kl", "logprob")},
    "swaps": {"estimand": ("gain",)},
    "first order": {"estimand": ("gain",), "exact_budget": 0.0, "kinds": ("head", "neuron")},
    "second order": {"estimand": ("knockout",), "exact_budget": 0.0, "kinds": ("kv_group",)},
    "activations": {"estimand": ("activation_gain",), "kinds": ("layer", "head")},
}


@pytest.mark.parametrize("what", ALONE)
def test_a_score_takes_the_flops_that_were_said(
    world: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = real(one(world, **ALONE[what]), monkeypatch)
    assert found.costs.left.flops == pytest.approx(found.flops, rel=CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 11, "unguarded": True},
        {"steps": 6, "front": (1.05,), "max_new_tokens": 3},
    ],
)
def test_a_fit_takes_what_was_said(
    world: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs, and every byte of a checkpoint that is read."""
    if "front" in options:
        options = options | {"guards": (world / "guard.jsonl",)}
    found = real(together(world, **options), monkeypatch)
    assert found.costs.left.flops == pytest.approx(found.flops, rel=CLOSE)
    assert found.costs.left.read == pytest.approx(found.read, rel=CLOSE)


@pytest.mark.parametrize("kept", [True, False])
def test_a_fit_of_adapters_takes_what_was_said(
    tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight gradient, and a second run forward only where memory is short."""
    base = save(make_model("llama-tied"), tmp_path / "base", torch.float32)
    adapters = {}
    for name in ("east", "west"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        folder, _ = make_adapter(base, tmp_path / name, target_modules=targets)
        weights = load_file(folder / "adapter_model.safetensors")
        if name == "west":
            save_file(
                {k: 0.5 * v for k, v in weights.items()}, folder / "adapter_model.safetensors"
            )
        adapters[name] = folder
        write_prompts(tmp_path / f"{name}.jsonl", 6, response=True)
    if not kept:
        for module in ("costs.joint", "joint.merged_model"):
            monkeypatch.setattr(f"mergekit_wp.{module}.free_memory", lambda _device: 0)
    experts = NamedExperts(
        base=str(base), experts=tuple((n, f"{base}+{a}") for n, a in adapters.items())
    )
    found = real(together(tmp_path, recipe=experts, steps=6, unguarded=True), monkeypatch)
    assert found.costs.left.flops == pytest.approx(found.flops, rel=CLOSE)
    assert found.costs.left.read == pytest.approx(found.read, rel=CLOSE)


@pytest.mark.parametrize("estimand", ["share", "gain"])
def test_a_score_reads_what_was_said(
    world: Path, estimand: Estimand, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = real(one(world, estimand=(estimand,), kinds=("layer", "head")), monkeypatch)
    assert found.costs.left.read == pytest.approx(found.read, rel=0.15)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a score file of one expert."""
    root = make_world(tmp_path_factory.mktemp("scored"), "llama-tied")
    estimand = ("share", "gain", "activation_gain")
    one(root, estimand=estimand, out=root / "east.safetensors")(Quiet())
    return root


def rescored(world: Path, **options: Any) -> dict[str, Any]:
    return {
        "file": world / "east.safetensors",
        "prompts": world / "open.jsonl",
        "device": "cpu",
        "batch_size": 3,
        "max_new_tokens": 3,
        **options,
    }


def test_a_curve_takes_what_was_said(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = VerifyRequest(**rescored(scored, prompts=scored / "west.jsonl", top="3,50%", draws=2))
    found = real(lambda said: verify(asked, None, said), monkeypatch)
    hashed = sum(s.work.read for s in found.costs.stages if s.name == "hashing weights")
    assert found.costs.left.flops == pytest.approx(found.flops, rel=CLOSE)
    # sets leave out what they do not touch
    assert found.read <= found.costs.left.read - hashed <= 1.5 * found.read


def test_circuits_and_anchors_take_no_more_than_was_said(
    scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = TraceRequest(**rescored(scored, targets=2, suppliers=2))
    anchored = AnchorRequest(
        base=str(scored / "base"),
        expert=str(scored / "east"),
        **{k: v for k, v in rescored(scored).items() if k != "file"},
    )
    for run in (lambda said: trace(traced, said), lambda said: find_anchors(anchored, said)):
        found = real(run, monkeypatch)
        assert found.flops <= found.costs.left.flops * (1 + CLOSE)
        assert found.costs.left.flops <= 2.5 * found.flops


def test_answers_are_counted_as_long_as_they_may_be(
    scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no answer ends before its last token, all of it is done."""
    ended = json.loads((scored / "base" / "generation_config.json").read_text())
    assert ended["eos_token_id"] == EOS == len(LETTERS) + 1
    found = real(one(scored, prompts=scored / "open.jsonl", max_new_tokens=4), monkeypatch)
    [asked] = [stage for stage in found.costs.stages if stage.name == "expert answers"]
    assert asked.work.steps == 2 * 3 and asked.said == "6 answers of at most 4"
    assert found.flops <= found.costs.left.flops * (1 + CLOSE)


def test_one_model_is_held_while_gates_are_fitted(scored: Path) -> None:
    """As the plan says: those that answered before are let go, whenever Python looks for cycles."""
    held = []

    def residents() -> list[ResidentModel]:
        return [o for o in gc.get_objects() if type(o) is ResidentModel]

    class Watching(Quiet):
        def stage(self, name: str, total: float, unit: str) -> None:
            if name == "fitting gates":
                models = [m for m in residents() if id(m) not in others]
                held.append(sum(not next(m.model.parameters()).is_meta for m in models))

    gc.collect()
    before = residents()  # of other tests, kept alive so that none of ours gets its number
    others = {id(model) for model in before}
    gc.disable()
    try:
        together(scored, steps=1)(Watching())
    finally:
        gc.enable()
    assert held == [1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks as Linux keeps them")
@pytest.mark.parametrize("command", ["score", "fit"])
def test_peak_memory_is_what_was_said(tmp_path: Path, command: str) -> None:
    """Of models of 170 MB, without what Python and its libraries took."""
    arguments = [sys.executable, "-m", "tests.costs_peak", command, str(tmp_path)]
    done = subprocess.run(
        arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    said, took = json.loads(done.stdout.splitlines()[-1])
    assert said == pytest.approx(took, rel=0.25)
