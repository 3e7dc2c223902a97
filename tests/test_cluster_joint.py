"""A fit on a cluster: the files of one process, whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_wp.cli import main
from mergekit_wp.engine.slopes import Term
from mergekit_wp.errors import OutOfMemory, UserError
from mergekit_wp.joint import merged_model
from mergekit_wp.joint.spread import SpreadModel
from mergekit_wp.runs.cluster import ATTEMPTS
from mergekit_wp.runs.journal import Journal
from tests.joint_runs import files, line, run
from tests.joint_world import make_world
from tests.local_ray import LocalRay, elsewhere, on
from tests.ray_runs import killed, ray_environment, started, workers_of
from tests.test_scoring import Quiet

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world("llama-tied", tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module", autouse=True)
def same_date() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(world, out)
    return out


@pytest.fixture(scope="module")
def spread(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, LocalRay]]:
    """Files of some workers, and they."""
    found: dict[int, tuple[Path, LocalRay]] = {}

    def of(cpus: int) -> tuple[Path, LocalRay]:
        if cpus not in found:
            out = tmp_path_factory.mktemp("spread") / "out"
            with pytest.MonkeyPatch.context() as patch:
                ray = on(patch, LocalRay(cpus))
                run(world, out, ray=True)
            found[cpus] = out, ray
        return found[cpus]

    return of


@pytest.mark.parametrize("cpus", [1, 2, 9])
def test_any_number_of_workers_write_the_files_of_one_process(
    cpus: int, alone: Path, spread: Callable[[int], tuple[Path, LocalRay]]
) -> None:
    out, ray = spread(cpus)
    assert files(out) == files(alone)
    assert ray.at_once >= min(cpus, 3)  # two behaviours and a guard are three terms


def test_a_killed_workers_terms_are_computed_again(
    world: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, said = on(monkeypatch, LocalRay(2, lambda number: number in (3, 4))), Quiet()
    run(world, tmp_path / "out", said, ray=True)
    assert files(tmp_path / "out") == files(alone)
    assert ray.started == 4
    [one, other] = [note for note in said.notes if "a worker has ended" in note]
    assert one.endswith(" of 2 of a step is computed again") and other.endswith(one[-25:])


def test_a_killed_driver_goes_on_from_the_journal(
    world: Path,
    alone: Path,
    spread: Callable[[int], tuple[Path, LocalRay]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved, count = Journal.save, 0

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def die(journal: Journal, key: str, tensors: Any) -> None:
        nonlocal count
        saved(journal, key, tensors)
        count += 1
        if count == 3:
            raise Killed

    on(monkeypatch, LocalRay(2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "save", die)
        run(world, tmp_path / "out", ray=True)
    ray, said = on(monkeypatch, LocalRay(2)), Quiet()
    run(world, tmp_path / "out", said, ray=True)
    assert any(note.startswith("continuing the run") for note in said.notes)
    _, whole = spread(2)
    assert ray.jobs < whole.jobs
    assert files(tmp_path / "out") == files(alone)


def test_terms_that_end_their_workers_are_given_up(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, LocalRay(1, lambda number: number > 2))
    with pytest.raises(ChildProcessError, match=f"of a step ended {ATTEMPTS} workers; what is "):
        run(world, tmp_path / "out", ray=True)
    assert list((tmp_path / "out" / "fit.partial").glob("state*"))


def test_a_worker_without_memory_steps_back_or_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes, most, refused = merged_model.slopes, 1, 0

    def small(decoder: Any, terms: list[Term], *rest: Any) -> Any:
        nonlocal refused
        if max(term.batch.size for term in terms) > most:
            refused += 1
            raise torch.OutOfMemoryError("it is full")
        return slopes(decoder, terms, *rest)

    on(monkeypatch, LocalRay(2))
    monkeypatch.setattr(merged_model, "slopes", small)
    run(world, tmp_path / "out", ray=True)
    assert refused
    most = 0
    with pytest.raises(OutOfMemory, match="out of memory with one sequence at a time"):
        run(world, tmp_path / "other", ray=True)


def test_a_worker_refuses_other_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, LocalRay(1))
    elsewhere(monkeypatch, tmp_path / "other")
    with pytest.raises(UserError, match="other' has other weights on .* same checkpoints"):
        run(world, tmp_path / "out", ray=True)


def test_longest_terms_first_each_to_whom_has_least() -> None:
    class Some:
        count = 2

        def __init__(self, size: int) -> None:
            self.batch = self
            self.ids = torch.zeros(size)
            self.weight = float(size)

    model = SpreadModel(Some(0))  # type: ignore[arg-type]
    parts = model._parts([Some(n) for n in (3, 9, 5, 6)])  # type: ignore[misc]
    assert [part.members for part in parts] == [(0, 1), (2, 3)]
    assert [part.weights for part in parts] == [(3.0, 9.0), (5.0, 6.0)]


def test_without_ray_the_extra_is_named(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        main(line(world, tmp_path / "out", "--ray"))
    assert stop.value.code == 2
    assert capfd.readouterr().err.strip() == (
        "mergekit-wp: --ray needs Ray, which is not installed: pip install 'mergekit-wp[ray]'"
    )
    assert not list(tmp_path.iterdir())


# --- with Ray -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_two_workers_one_killed_mid_step_then_the_driver(world: Path, tmp_path: Path) -> None:
    steps = "--steps=50"
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert started(line(world, alone, steps), ray_environment()).wait() == 0
    process = started(line(world, spread, steps, "--ray"), ray_environment())
    while len(victims := list(workers_of(process.pid))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

    def await_change(last: float) -> float:
        """When the journal was last written, after some time."""
        while process.poll() is None:
            found = [path.stat().st_mtime for path in spread.glob("*.partial/state*.safetensors")]
            if max(found, default=0.0) > last:
                return max(found)
            time.sleep(0.005)
        raise AssertionError(process.communicate())

    last = await_change(await_change(0.0))
    os.kill(victims[0], signal.SIGKILL)
    await_change(await_change(last))
    said = killed(process)
    assert "a worker has ended; its part " in said
    again = started(line(world, spread, steps, "--ray"), ray_environment())
    _, said = again.communicate()
    assert again.returncode == 0 and "continuing the run in" in said, said
    assert files(spread) == files(alone)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_running_cluster_of_two_machines(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "")
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        machines.add_node(num_cpus=1)
        address = ray_environment() | {"RAY_ADDRESS": machines.address}
        process = started(line(world, tmp_path / "spread", "--ray"), address)
        _, said = process.communicate()
        assert process.returncode == 0, said
    finally:
        machines.shutdown()
    assert started(line(world, tmp_path / "alone"), ray_environment()).wait() == 0
    assert files(tmp_path / "spread") == files(tmp_path / "alone")
