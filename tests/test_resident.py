"""A model that is spread or offloaded gives the scores of one that is not, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.cli import main
from mergekit_wp.errors import UserError
from mergekit_wp.models import resident as module
from mergekit_wp.models.placement import DISK, placement
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.terms import LONE_ESTIMANDS, SLICED_KINDS
from tests.models import CONFIGS, FAMILIES, make_model, perturbed, save, write_prompts
from tests.test_scoring import Quiet

torch.set_num_threads(1)
EVERY = [*CONFIGS, *FAMILIES]
QUICK = ("llama-tied", "gpt2", "qwen3_moe")


def world(folder: Path, family: str) -> dict[str, Any]:
    base = make_model(family)
    save(base, folder / "base")
    save(perturbed(base, 0.05), folder / "expert")
    prompts = write_prompts(folder / "p.jsonl", 4, contrast=True)
    return {
        "base": str(folder / "base"),
        "expert": str(folder / "expert"),
        "prompts": prompts,
        "estimand": LONE_ESTIMANDS,
        "exact_budget": 0.0,  # heads, groups and neurons to first order, then exactly
        "dtype": "float64",
        "max_new_tokens": 2,
        "share_steps": 2,
        "verify": 1,
        "batch_size": 4,
    }


def elsewhere(monkeypatch: pytest.MonkeyPatch, *places: str) -> None:
    """Weights go to some places in turn, whatever there is room for."""

    def instead(*args: Any) -> dict[str, str]:
        return {name: places[i % len(places)] for i, name in enumerate(placement(*args))}

    monkeypatch.setattr(module, "placement", instead)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in EVERY],
)
def test_scores_are_those_of_a_model_on_one_device(
    family: str, tmp_path: Path, monkeypatch
) -> None:
    given = world(tmp_path, family)
    whole = score(ScoreRequest(**given, out=tmp_path / "a.safetensors"), Quiet())
    # to torch, cpu:0 is another device than cpu: it stands for main memory beside a GPU
    elsewhere(monkeypatch, DISK, "cpu:0", "cpu")
    said = Quiet()
    request = ScoreRequest(
        **given, out=tmp_path / "b.safetensors", device_map="auto", max_memory={"cpu": 0}
    )
    spread = score(request, said)
    assert said.notes[0].startswith("weights: ") and said.notes[0].count(" on ") == 3
    assert "GiB of weights were fetched" in said.notes[-1]
    assert list(spread.tensors) == list(whole.tensors)
    for key, tensor in whole.tensors.items():
        assert torch.equal(spread.tensors[key], tensor), key
    assert spread.manifest.noise_floor == whole.manifest.noise_floor


def test_exact_sweeps_from_the_checkpoints_are_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    given = world(tmp_path, "llama-tied") | {"exact_budget": 256.0}
    whole, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    score(ScoreRequest(**given, out=whole), Quiet())
    saved = Journal.save

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def die(journal: Journal, key: str, tensors: Any) -> None:
        saved(journal, key, tensors)
        if key.startswith("exact.knockout"):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "save", die)
        score(ScoreRequest(**given, out=other, device_map="auto", max_memory={"cpu": 0}), Quiet())
    said = Quiet()
    score(ScoreRequest(**given, out=other), said)  # a run goes on with a device map or without
    assert any(note.startswith("continuing the run") for note in said.notes)
    assert other.read_bytes() == whole.read_bytes()


def test_a_model_with_room_is_held_as_ever(tmp_path: Path) -> None:
    given, said = world(tmp_path, "llama-tied"), Quiet()
    given |= {"estimand": ("share",), "kinds": SLICED_KINDS}
    score(
        ScoreRequest(**given, out=tmp_path / "a", device_map="auto", max_memory={"cpu": 2**30}),
        said,
    )
    assert said.notes[0] == "weights: 0.00 GiB on cpu"
    assert "fetched" not in said.notes[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "cpu=1GiB"], "--max-memory says where weights go with --device-map"),
        (["--device-map", "auto", "--max-memory", "cpu=1"], "expected DEVICE=SIZE"),
        (["--device-map", "auto", "--ray"], "--device-map with --ray needs --max-memory"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capfd) -> None:
    given = world(tmp_path, "llama-tied")
    command = ["score", given["base"], given["expert"], "--prompts", str(given["prompts"])]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / "out.safetensors"), "--device", "cpu", *arguments])
    lines = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.glob("out*"))


def test_workers_have_one_gpu(tmp_path: Path) -> None:
    request = ScoreRequest(
        **world(tmp_path, "llama-tied"),
        out=tmp_path / "a",
        ray=True,
        device_map="auto",
        max_memory={"1": 1},
    )
    with pytest.raises(UserError, match="every worker has one GPU, which it calls 0"):
        score(request, Quiet())


def test_a_model_without_a_map_is_refused(tmp_path: Path) -> None:
    given = world(tmp_path, "stablelm") | {"estimand": ("share",)}
    request = ScoreRequest(**given, out=tmp_path / "a", device_map="auto", max_memory={"cpu": 0})
    with pytest.raises(UserError, match="device_map needs"):
        score(request, Quiet())
