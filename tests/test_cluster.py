"""Sweeps on a Ray cluster: the same file, whoever is killed. Only what needs no Ray is quick."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.cli import main
from mergekit_wp.errors import OutOfMemory, UserError, option
from mergekit_wp.interrupts import Interrupted, listening
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample
from mergekit_wp.runs.cluster import ATTEMPTS, Cluster, SentModels, Worker, moved
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.runs.references import measure_references
from mergekit_wp.runs.request import RunRequest
from mergekit_wp.scoring.blocks import Block, noise_blocks, share_blocks
from mergekit_wp.scoring.measure import Blocks, measure
from tests.models import make_model, perturbed, save, write_prompts
from tests.ray_runs import killed, ray_environment, started, workers_of
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    save(perturbed(base), root / "expert", torch.float32)
    write_prompts(root / "p.jsonl", 6, contrast=True)
    return root


def recorded(world: Path, max_memory: dict[str, int] | None = None) -> Recordings:
    pair = open_pair(str(world / "base"), str(world / "expert"), lambda *_: None)
    resident = ResidentModel(pair, torch.float32, "cpu", max_memory)
    samples = [Sample((1, 2, 3), (4, 5)), Sample((6, 7), (8,)), Sample((9,), (1, 2))]
    references = measure_references(resident, samples, ("kl",), 2)
    return Recordings(resident, references, ("kl",))


def assignment(recordings: Recordings) -> Blocks:
    limits = recordings.resident.max_memory
    given = {} if limits is None else {"device_map": "auto", "max_memory": limits}
    models = SentModels.of(RunRequest(device="cpu", **given), recordings.pair)
    return Blocks(models, recordings.references, ("kl",), 2)


def two_at_once(recordings: Recordings) -> AtOnce:
    return AtOnce(2, print, recordings.forget)


@pytest.mark.parametrize("max_memory", [None, {"cpu": 0}], ids=["held", "offloaded"])
def test_a_worker_computes_the_drivers_blocks_bit_by_bit(
    world: Path, max_memory: dict[str, int] | None
) -> None:
    ours, theirs = recorded(world), recorded(world, max_memory)
    worker = Worker(assignment(theirs))
    blocks = [*share_blocks(ours, 3), *noise_blocks(ours, "gain")]
    for block in [*blocks[::2], *blocks[1::2][::-1]]:  # in another order
        sent: Block = pickle.loads(pickle.dumps(block))
        found, want = worker.run(sent), measure(block, ours, two_at_once(ours))
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
    assert worker._compute is not None
    resident = worker._compute.keywords["recordings"].resident  # type: ignore[attr-defined]
    assert bool(resident.fetched) is (max_memory is not None)


def test_a_worker_refuses_other_weights_under_the_same_path(world: Path, tmp_path: Path) -> None:
    ours = recorded(world)
    other = perturbed(make_model("llama-tied"), seed=9)
    save(other, tmp_path / "expert", torch.float32)
    given = assignment(ours)
    models = replace(given.models, experts=(str(tmp_path / "expert"),))
    elsewhere = replace(given, models=models)
    with pytest.raises(UserError, match="expert' has other weights on .* same checkpoints"):
        Worker(elsewhere).run(next(share_blocks(ours, 1)))


def test_everything_is_moved(world: Path) -> None:
    references = moved(recorded(world).references, "meta")
    assert references.batches[0].ids.is_meta and references.values["kl"].base.is_meta
    logprobs = references.targets[1].expert_logprobs
    assert logprobs is not None and logprobs.is_meta


class Lost(Exception):
    """A worker that was killed."""


class Wrong(Exception):
    """A mistake within a block."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass(frozen=True, eq=False)
class Task:
    """A block that a worker is at."""

    block: Block


class FakeRay:
    """Ray's calls, one after the other in this process; ``kills`` says how often a block's dies."""

    def __init__(self, cpus: int | list[int], kills: dict[str, int]) -> None:
        self.cpus = [cpus] if isinstance(cpus, int) else cpus  # of each node
        self.kills, self.at_once, self.started = kills, 0, 0
        self.exceptions = type("E", (), {"RayTaskError": Wrong, "RayActorError": Lost})

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [dead, *({"Alive": True, "Resources": {"CPU": float(n)}} for n in self.cpus)]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, cls: type) -> Any:
        ray = self

        class Actor:
            @staticmethod
            def options(**needs: Any) -> Any:
                assert needs == {"max_restarts": 0, "num_cpus": 1}
                return Actor

            @staticmethod
            def remote(assignment: Any) -> Any:
                ray.started += 1
                run = type("Run", (), {"remote": staticmethod(lambda block: Task(block))})
                return type("Handle", (), {"run": run})

        return Actor

    def wait(self, busy: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.at_once = max(self.at_once, len(busy))
        return busy[-1:], busy[:-1]

    def get(self, task: Any) -> Any:
        key = "abcdefw"[task.block.layer]
        if self.kills.get(key, 0) > 0:
            self.kills[key] -= 1
            raise Lost(f"{key} died")
        if key == "w":
            raise Wrong(UserError("told as it is"))
        return {key: torch.ones(1)}


def blocks_of(letters: str) -> list[Block]:
    return [Block("noise", "gain", 0, "abcdefw".index(letter)) for letter in letters]


def cluster_on(ray: FakeRay, world: Path, progress: Quiet) -> Cluster:
    ours = recorded(world)
    return Cluster(ray, assignment(ours), progress)  # type: ignore[arg-type]


def on(ray: FakeRay, letters: str, world: Path) -> tuple[dict[str, Any], list[str]]:
    progress, found = Quiet(), {}
    workers = cluster_on(ray, world, progress)
    workers.run(blocks_of(letters), lambda _, result: found.update(result))
    return found, progress.notes


def test_a_killed_workers_block_is_computed_again(world: Path) -> None:
    ray = FakeRay(2, {"b": ATTEMPTS - 1})
    found, notes = on(ray, "abcde", world)
    assert sorted(found) == list("abcde") and ray.at_once == 2
    assert ray.started == 2 + 2, "a killed worker is replaced, the others go on"
    assert (
        notes
        == ["a worker has ended; its part noise.gain.batch0000.layer0001 is computed again"] * 2
    )


def test_a_worker_is_within_one_node(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes with 3 and 5 CPUs, workers of 2 have room for 1 + 2, not for 4."""
    assert cluster_on(FakeRay([3, 5], {}), world, Quiet()).count == 8
    ours = assignment(recorded(world))
    wide = replace(ours, models=replace(ours.models, threads=2))
    ray = FakeRay([3, 5], {})
    monkeypatch.setattr(ray, "remote", lambda _: type("A", (), {"options": lambda **_: None}))
    assert Cluster(ray, wide, Quiet()).count == 3  # type: ignore[arg-type]
    ray.cpus = [1, 1]
    with pytest.raises(UserError, match="no worker with 2 CPUs"):
        Cluster(ray, wide, Quiet())  # type: ignore[arg-type]


def test_a_mistake_comes_from_a_worker_as_it_was_raised() -> None:
    """Its options are still to be spelt, as the command does that shows it."""
    error = pickle.loads(pickle.dumps(OutOfMemory(f"free some, or add {option('restart', True)}")))
    assert isinstance(error, OutOfMemory) and str(error) == "free some, or add restart=True"
    error.use_flags({"restart": "--restart"})
    assert str(error) == "free some, or add --restart"


def test_a_block_that_kills_its_workers_is_given_up(world: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"^noise.*layer0001 ended 3 workers; .* b died"):
        on(FakeRay(2, {"b": ATTEMPTS}), "abc", world)


def test_a_mistake_in_a_worker_is_told_as_it_is(world: Path) -> None:
    with pytest.raises(UserError, match="^told as it is$"):
        on(FakeRay(1, {}), "aw", world)


def test_a_cluster_that_is_too_small(world: Path) -> None:
    with pytest.raises(UserError, match="has no worker with 1 CPUs, as this process uses"):
        on(FakeRay(0, {}), "a", world)


def test_a_signal_waits_for_the_blocks_that_are_being_computed(world: Path) -> None:
    ray, found = FakeRay(2, {}), []
    workers = cluster_on(ray, world, Quiet())

    def on_result(_: Block, result: Any) -> None:
        if not found:
            os.kill(os.getpid(), signal.SIGINT)
        found.extend(result)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Interrupted), listening():
            workers.run(blocks_of("abcde"), on_result)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == ["b", "a"], "both that had begun are kept, and no other is begun"


def command(world: Path, out: Path, *more: str) -> list[str]:
    pair = [str(world / "base"), str(world / "expert"), f"--prompts={world / 'p.jsonl'}"]
    return [
        *("score", *pair, "--batch-size=2", "--max-new-tokens=3", "--verify=3"),
        *("--estimand=share,gain,knockout,activation_gain", f"--out={out}", *more),
    ]


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    return line


def test_without_ray_the_extra_is_named(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal(command(world, tmp_path / "s.safetensors", "--ray"), capfd) == (
        "mergekit-wp: --ray needs Ray, which is not installed: pip install 'mergekit-wp[ray]'"
    )
    assert not list(tmp_path.iterdir())


def test_an_address_where_nobody_answers(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Unused:
        def init(self, **_: Any) -> None:
            raise AssertionError

    monkeypatch.setitem(sys.modules, "ray", Unused())  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as stop:
        main(command(world, tmp_path / "s.safetensors", "--ray"))
    assert stop.value.code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "no Ray cluster can be reached: RAY_ADDRESS is 127.0.0.1:1: Connection refused" in last


# --- with Ray -------------------------------------------------------------------------------------


def blocks(out: Path) -> int:
    return len(list(out.with_name(out.name + ".partial").glob("*.safetensors")))


def await_blocks(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while blocks(out) < count and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_two_workers_one_killed_then_the_driver(world: Path, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone.safetensors", tmp_path / "spread.safetensors"
    assert started(command(world, alone), ray_environment()).wait() == 0
    process = started(command(world, spread, "--ray"), ray_environment())
    while len(victims := list(workers_of(process.pid))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    await_blocks(spread, 8, process)
    os.kill(victims[0], signal.SIGKILL)
    await_blocks(spread, 30, process)
    said = killed(process)
    assert "a worker has ended; its part " in said
    assert blocks(spread) >= 30 and not spread.exists()
    again = started(command(world, spread, "--ray"), ray_environment())
    _, said = again.communicate()
    assert again.returncode == 0 and "continuing the run in" in said, said
    assert spread.read_bytes() == alone.read_bytes()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_workers_with_a_gpu(world: Path, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone.safetensors", tmp_path / "spread.safetensors"
    assert started(command(world, alone, "--device=cuda"), ray_environment()).wait() == 0
    many = started(command(world, spread, "--device=cuda", "--ray"), ray_environment())
    _, said = many.communicate()
    assert many.returncode == 0, said
    assert spread.read_bytes() == alone.read_bytes()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_alone(
    world: Path, tmp_path: Path, number: signal.Signals
) -> None:
    alone, spread = tmp_path / "alone.safetensors", tmp_path / "spread.safetensors"
    assert started(command(world, alone), ray_environment()).wait() == 0
    process = started(command(world, spread, "--ray"), ray_environment())
    await_blocks(spread, 6, process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number, said
    assert "interrupted; what is done is kept in" in said and "Traceback" not in said
    assert started(command(world, spread), ray_environment()).wait() == 0
    assert spread.read_bytes() == alone.read_bytes()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_running_cluster_of_two_machines(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, spread = tmp_path / "alone.safetensors", tmp_path / "spread.safetensors"
    monkeypatch.setenv("PYTHONWARNINGS", "")
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        machines.add_node(num_cpus=1)
        address = ray_environment() | {"RAY_ADDRESS": machines.address}
        process = started(command(world, spread, "--ray"), address)
        _, said = process.communicate()
        assert process.returncode == 0, said
    finally:
        machines.shutdown()
    assert started(command(world, alone), ray_environment()).wait() == 0
    assert spread.read_bytes() == alone.read_bytes()
