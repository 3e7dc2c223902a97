"""Running out of memory: smaller steps with the same result, and one clear error at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.errors import UserError
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.memory import GIB, free_memory, is_out_of_memory, peak_memory
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import finetuned, make_model, save, write_prompts
from tests.peak import save_pair
from tests.test_scoring import Quiet

torch.set_num_threads(1)
ON_CPU = "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"


class SmallMemory:
    """Layers that refuse more than some tokens at once, in whatever holds a ``model``."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        tokens: int,
        holder: type = ResidentModel,
    ) -> None:
        self.tokens, self.refused = tokens, 0
        make = holder.__init__

        def hook(_module: Any, args: tuple[Any, ...], _kwargs: Any) -> None:
            if args[0].shape[0] * args[0].shape[1] > self.tokens:
                self.refused += 1
                raise error

        def patched(held: Any, *args: Any, **kwargs: Any) -> None:
            make(held, *args, **kwargs)
            for layer in held.model.model.layers:
                layer.register_forward_pre_hook(hook, with_kwargs=True)

        monkeypatch.setattr(holder, "__init__", patched)


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("memory")
    base = make_model("llama-tied")
    prompts = write_prompts(folder / "p.jsonl", 5, response=True)
    sides = {"base": base, "expert": finetuned(base, prompts)}
    paths = {name: str(save(model, folder / name)) for name, model in sides.items()}

    def make(out: Path, **options: Any) -> ScoreRequest:
        given = {"dtype": "float64", "estimand": ("share", "gain", "knockout"), "verify": 2}
        return ScoreRequest(**paths, prompts=prompts, out=out, **given | options)

    return make


@pytest.fixture(scope="module", params=[256.0, 0.0], ids=["exact", "first-order"])
def scored(request, request_of, tmp_path_factory) -> tuple[float, ScoreFile]:
    """A budget of exact swaps, and what is measured with enough memory."""
    out = tmp_path_factory.mktemp("whole") / "a.safetensors"
    return request.param, score(request_of(out, exact_budget=request.param), Quiet())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(ON_CPU)],
    ids=["cuda", "python", "cpu"],
)
def test_scores_are_the_same_with_little_memory(
    request_of, tmp_path, monkeypatch, error, scored
) -> None:
    budget, whole = scored
    memory = SmallMemory(monkeypatch, error, 10**6)

    class Tightening(Quiet):
        def stage(self, name: str, total: float, unit: str) -> None:
            memory.tokens = 16 if name.startswith("base and expert") else 9
            super().stage(name, total, unit)

    said = Tightening()
    small = score(request_of(tmp_path / "b.safetensors", exact_budget=budget), said)
    assert memory.refused >= 3
    assert any("out of memory; going on with" in note for note in said.notes)
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(small.tensors[key], tensor, rtol=1e-5, atol=1e-7)


def test_no_memory_at_all_is_one_clear_error(request_of, tmp_path, monkeypatch) -> None:
    memory = SmallMemory(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 10**6)

    class Gone(Quiet):
        def stage(self, name: str, total: float, unit: str) -> None:
            memory.tokens = 0 if name == "share" else 10**6
            super().stage(name, total, unit)

    with pytest.raises(UserError, match="out of memory with one sequence at a time"):
        score(request_of(tmp_path / "a.safetensors"), Gone())


def test_other_errors_are_not_taken_for_it(request_of, tmp_path, monkeypatch) -> None:
    SmallMemory(monkeypatch, RuntimeError("size mismatch"), 9)
    with pytest.raises(RuntimeError, match="size mismatch"):
        score(request_of(tmp_path / "a.safetensors"), Quiet())
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_memory_is_measured(request_of, tmp_path) -> None:
    before = peak_memory()
    block = torch.ones(before // 4 + 2**26, dtype=torch.uint8)  # more than was ever touched
    held = [torch.ones(before, dtype=torch.uint8)]
    assert peak_memory() >= before + block.numel() and free_memory("cpu") > 0
    del held
    said = Quiet()
    score(request_of(tmp_path / "a.safetensors", estimand=("share",)), said)
    assert any(note.startswith("peak memory") and "weights" in note for note in said.notes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_only_the_base_is_resident(tmp_path) -> None:
    """The peak, less what Python takes, is within 1.25 times the weights plus the stated budget.

    With all weights offloaded it is within a quarter of them; a layer is a sixteenth.
    """
    save_pair(tmp_path / "small", 16, 1)
    weights = save_pair(tmp_path / "large", 384, 16)
    done = subprocess.run(
        [sys.executable, "-m", "tests.peak", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        # blocks of this size are mapped, and given back when freed, as those of large models are
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )
    shutil.rmtree(tmp_path / "large")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    said = re.search(r"weights ([\d.]+) GiB, activation budget ([\d.]+) GiB", found["note"])
    assert said and float(said[1]) == pytest.approx(weights / GIB, abs=0.006)
    allowed = 1.25 * weights + (float(said[2]) + 0.005) * GIB
    assert weights < found["peak"] - found["start"] <= allowed
    assert found["holding"] - found["start"] > allowed  # had the expert been read as a whole
    assert found["offloaded"] - found["start"] <= allowed - weights


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_read_file_is_not_kept_in_memory(request_of, tmp_path) -> None:
    checkpoint = Checkpoint(request_of(tmp_path / "a").expert)
    for name in checkpoint.headers:
        checkpoint.tensor(name, torch.float64)
    assert str(checkpoint.weight_files[0]) not in Path("/proc/self/maps").read_text()
