"""Sets verified, circuits traced and anchors looked for on a cluster: what one process finds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.cli import main
from mergekit_wp.errors import UserError
from mergekit_wp.mechanism.anchors import find_anchors
from mergekit_wp.mechanism.circuit import trace
from mergekit_wp.mechanism.request import AnchorRequest, TraceRequest, VerifyRequest
from mergekit_wp.mechanism.verify import verify
from mergekit_wp.runs.cluster import ATTEMPTS
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from tests.local_ray import LocalRay, elsewhere, on
from tests.models import make_model, perturbed, save, write_prompts
from tests.ray_runs import killed, ray_environment, started, workers_of
from tests.test_scoring import Quiet

torch.set_num_threads(1)
COMMANDS = ("verify", "trace", "anchor")
#: a rule of the user's own, which workers have no file of
CHECKER = "def has_a(item, output):\n    return 'a' in output\n"


@pytest.fixture(autouse=True)
def same_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mechanism")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    save(perturbed(base, 0.2), root / "expert", torch.float32)
    prompts = write_prompts(root / "prompts.jsonl", 5, contrast=True)
    score(
        ScoreRequest(
            base=str(root / "base"),
            expert=str(root / "expert"),
            prompts=prompts,
            out=root / "scores.safetensors",
            estimand=("share", "activation_gain"),
            criterion=("kl", "anchor"),
            verify=0,
            max_new_tokens=3,
        ),
        Quiet(),
    )
    (root / "checkers.py").write_text(CHECKER)
    items = [
        {"prompt": "abc", "answer": "z", "split": "test", "checker": "contains"},
        {"prompt": "cab", "split": "test", "checker": "has_a"},
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
    return root


def run(command: str, world: Path, out: Path, said: Quiet | None = None, **options: Any) -> bytes:
    """All that a command finds."""
    out.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "prompts": world / "prompts.jsonl",
        "device": "cpu",
        "batch_size": 2,
        "max_new_tokens": 3,
        **options,
    }
    said, file = said or Quiet(), out / "scores.safetensors"
    if command == "anchor":
        models = {"base": str(world / "base"), "expert": str(world / "expert")}
        found = find_anchors(AnchorRequest(**models, **settings), said)
        return repr([asdict(layer) for layer in found]).encode()
    if command == "trace":
        settings |= {"targets": 3, "suppliers": 3, "out": out / "trace.json"}
        trace(TraceRequest(file=world / "scores.safetensors", **settings), said)
        return (out / "trace.json").read_bytes()
    if not file.exists():
        file.write_bytes((world / "scores.safetensors").read_bytes())
    task = JsonlTask.read(world / "items.jsonl", Checkers.load(world / "checkers.py"))
    verify(VerifyRequest(file=file, top=("3",), draws=2, **settings), task, said)
    return file.read_bytes()


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """What one process finds."""
    found: dict[str, bytes] = {}

    def of(command: str) -> bytes:
        if command not in found:
            found[command] = run(command, world, tmp_path_factory.mktemp(command))
        return found[command]

    return of


@pytest.fixture(scope="module")
def spread(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[bytes, LocalRay]]:
    """What some workers find, and they."""
    found: dict[tuple[str, int], tuple[bytes, LocalRay]] = {}

    def of(command: str, cpus: int) -> tuple[bytes, LocalRay]:
        if (key := (command, cpus)) not in found:
            with pytest.MonkeyPatch.context() as patch:
                ray = on(patch, LocalRay(cpus))
                found[key] = run(command, world, tmp_path_factory.mktemp(command), ray=True), ray
        return found[key]

    return of


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("cpus", [1, 3])
def test_any_number_of_workers_find_what_one_process_does(
    command: str,
    cpus: int,
    alone: Callable[[str], bytes],
    spread: Callable[[str, int], tuple[bytes, LocalRay]],
) -> None:
    found, ray = spread(command, cpus)
    assert found == alone(command)
    assert ray.at_once == min(cpus, 2 if command == "anchor" else 3)  # of two layers


@pytest.mark.parametrize("command", COMMANDS)
def test_workers_may_fetch_all_weights(
    command: str,
    world: Path,
    alone: Callable[[str], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, LocalRay(3))
    limits = {"device_map": "auto", "max_memory": {"cpu": 0}}
    assert run(command, world, tmp_path, ray=True, **limits) == alone(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_workers_part_is_computed_again(
    command: str,
    world: Path,
    alone: Callable[[str], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, said = on(monkeypatch, LocalRay(2, lambda number: number == 1)), Quiet()
    assert run(command, world, tmp_path, said, ray=True) == alone(command)
    assert ray.started == 3
    assert sum("a worker has ended; its part" in note for note in said.notes) == 1


@pytest.mark.parametrize("command", ["verify", "trace"])
def test_a_killed_driver_goes_on_from_the_journal(
    command: str,
    world: Path,
    alone: Callable[[str], bytes],
    spread: Callable[[str, int], tuple[bytes, LocalRay]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved, count = Journal.save, 0

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def die(journal: Journal, key: str, tensors: Any) -> None:
        nonlocal count
        saved(journal, key, tensors)
        count += not key.startswith("responses.")
        if count == 4:
            raise Killed

    on(monkeypatch, LocalRay(2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "save", die)
        run(command, world, tmp_path / "out", ray=True)
    ray, said = on(monkeypatch, LocalRay(2)), Quiet()
    assert run(command, world, tmp_path / "out", said, ray=True) == alone(command)
    assert any(note.startswith("continuing the run") for note in said.notes)
    _, whole = spread(command, 3)
    assert ray.jobs == whole.jobs - 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_part_that_ends_its_workers_is_given_up(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, LocalRay(1, lambda _: True))
    with pytest.raises(ChildProcessError, match=f" ended {ATTEMPTS} workers; what is done is kept"):
        run(command, world, tmp_path, ray=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_worker_refuses_other_weights(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, LocalRay(1))
    elsewhere(monkeypatch, tmp_path / "other")
    with pytest.raises(UserError, match="other' has other weights on .* same checkpoints"):
        run(command, world, tmp_path / "out", ray=True)


def line(command: str, world: Path, out: Path, *more: str) -> list[str]:
    models = [str(world / "base"), str(world / "expert")]
    whole = {
        "verify": [str(out / "scores.safetensors"), "--top=3,5%,25%", "--draws=12"],
        "trace": [str(world / "scores.safetensors"), f"--out={out / 'trace.json'}"],
        "anchor": [*models, "--json"],
    }
    if command == "verify":
        whole[command] += [f"--task={world / 'items.jsonl'}"]
        whole[command] += [f"--checkers={world / 'checkers.py'}"]
    usual = [f"--prompts={world / 'prompts.jsonl'}", "--device=cpu", "--batch-size=2"]
    return [command, *whole[command], *usual, "--max-new-tokens=3", *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input(
    command: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "scores.safetensors").write_bytes((world / "scores.safetensors").read_bytes())

    def refusal(*options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(line(command, world, tmp_path, "--ray", *options))
        assert stop.value.code == 2
        return capfd.readouterr().err.strip()

    assert refusal("--device-map=auto") == (
        "mergekit-wp: --device-map with --ray needs --max-memory: the workers of one machine do "
        "not know of each other what they take"
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal() == (
        "mergekit-wp: --ray needs Ray, which is not installed: pip install 'mergekit-wp[ray]'"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


# --- with Ray -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("command", COMMANDS)
def test_two_workers_one_killed_then_the_driver(command: str, world: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("alone", "spread")}
    for folder in folders.values():
        folder.mkdir()
        copy = folder / "scores.safetensors"
        copy.write_bytes((world / "scores.safetensors").read_bytes())
    spread = folders["spread"]

    def begun(folder: Path, *more: str) -> Any:
        return started(line(command, world, folder, *more), ray_environment(), shown=True)

    shown, said = begun(folders["alone"]).communicate()
    process = begun(spread, "--ray")
    if command == "anchor":  # two jobs, and no journal
        assert process.communicate()[0] == shown
        return
    while len(victims := list(workers_of(process.pid))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

    def await_parts(count: int) -> None:
        while len(list(spread.glob("*.partial/[!r]*.safetensors"))) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)

    await_parts(4)
    os.kill(victims[0], signal.SIGKILL)
    await_parts(12)
    assert "a worker has ended; its part " in killed(process)
    again = begun(spread, "--ray")
    _, said = again.communicate()
    assert again.returncode == 0 and "continuing the run in" in said, said
    result = {"verify": "scores.safetensors", "trace": "trace.json"}[command]
    assert (spread / result).read_bytes() == (folders["alone"] / result).read_bytes()
