"""mergekit's options for devices and memory, as far as they can run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mergekit.multigpu_executor as multigpu
import pytest
import torch
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.merging.fusion import component_gates, fuse
from mergekit_wp.merging.method import WeightPatchingMerge
from mergekit_wp.terms import FUSIONS, Fusion
from tests.merging import Family, State, by_mergekit, llama_config
from tests.test_merge_command import done, refused, write

ensure_registered()


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.make(tmp_path, llama_config())


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache.loaders.clear()
    yield


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    "option", ["--low-cpu-memory", "--lazy-unpickle", "--read-to-gpu", "--async-write"]
)
def test_an_option_changes_no_weight(family: Family, tmp_path: Path, option: str) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    plain = done(recipe, tmp_path / "plain")
    assert same(done(recipe, tmp_path / "out", option), plain)


def test_pickled_checkpoints_are_read_only_lazily(family: Family, tmp_path: Path) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    plain = done(recipe, tmp_path / "plain")
    LoaderCache.loaders.clear()
    for checkpoint in (family.base, *family.experts):
        weights = checkpoint.path / "model.safetensors"
        torch.save(load_file(weights), checkpoint.path / "pytorch_model.bin")
        weights.unlink()
    assert "has pickled weights" in refused(recipe, tmp_path / "out")
    assert same(done(recipe, tmp_path / "out", "--lazy-unpickle"), plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["--cuda", "--multi-gpu", "--gpu-rich"])
def test_without_a_gpu_the_option_is_refused(family: Family, tmp_path: Path, option: str) -> None:
    recipe = write(family.recipe(), tmp_path / "recipe.yml")
    message = refused(recipe, tmp_path / "out", option)
    assert "cannot be used here" in message or "--multi-gpu needs a GPU" in message


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's multi-GPU executor over the CPU twice: its threads, its islands, no streams."""
    monkeypatch.setattr(multigpu, "get_torch_accelerator_type", lambda *_: "cpu")
    monkeypatch.setattr(multigpu, "get_torch_accelerator_count", lambda *_: 2)
    idle = SimpleNamespace(synchronize=lambda device: None)
    monkeypatch.setattr(multigpu, "get_torch_accelerator_module", lambda *_: idle)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.parametrize("low_cpu_memory", [False, True])
def test_the_threads_of_multi_gpu(
    family: Family, tmp_path: Path, two_devices: None, low_cpu_memory: bool
) -> None:
    plain = by_mergekit(family.recipe(), tmp_path / "plain")
    options = {"multi_gpu": True, "low_cpu_memory": low_cpu_memory}
    assert same(by_mergekit(family.recipe(), tmp_path / "out", **options), plain)


@pytest.mark.parametrize("fusion", ["share", "winner", "gate", "topk"])
def test_nothing_is_made_on_a_workers_default_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fusion: str
) -> None:
    """Multi-GPU workers make what names no device on theirs; here meta."""
    family = Family.make(tmp_path, llama_config())
    recipe = family.recipe({"density": 0.7}, {"weight": 0.5}, parameters={"fusion": fusion})
    plain = by_mergekit(recipe, tmp_path / "plain")
    fuse_group = WeightPatchingMerge.merge_group

    def on_meta(self: WeightPatchingMerge, group: Any, /, **parameters: Any) -> torch.Tensor:
        with torch.device("meta"):
            return fuse_group(self, group, **parameters)

    monkeypatch.setattr(WeightPatchingMerge, "merge_group", on_meta)
    for path in family.paths:  # as if read for the first time
        path.touch()
    assert same(by_mergekit(recipe, tmp_path / "out"), plain)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gates_live_where_the_scores_do(fusion: Fusion) -> None:
    scores, weights = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([1.0, 0.5])
    with torch.device("meta"):
        gates = component_gates(scores, weights, fusion=fusion)
    assert torch.equal(gates, component_gates(scores, weights, fusion=fusion))


def test_weights_are_fused_where_they_are() -> None:
    base, expert = (torch.empty((6, 4), dtype=torch.bfloat16, device="meta") for _ in range(2))
    for gates in (
        torch.rand(2, 6, 1),
        torch.eye(2)[:, :, None].repeat(1, 3, 1),
        torch.ones(2, 1, 1),
    ):
        fused = fuse(base, [expert, expert], gates.double())
        assert fused.is_meta and fused.dtype == torch.bfloat16
