"""A comparison on a cluster: the files of one process, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import yaml

from mergekit_wp.cli import main
from mergekit_wp.comparison import evaluation
from mergekit_wp.comparison import run as running
from mergekit_wp.comparison.compare import compare
from mergekit_wp.comparison.peers import merging
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.comparison.results import Results
from mergekit_wp.errors import UserError
from mergekit_wp.runs.cluster import ATTEMPTS
from tests.local_ray import LocalRay, on
from tests.merging import Family, llama_config
from tests.models import save_tokenizer, write_prompts
from tests.ray_runs import killed, ray_environment, started, workers_of
from tests.test_scoring import Quiet

torch.set_num_threads(1)
#: settings that are tried on their own, that learn, that draw, and that go on from others'
METHODS = (
    "weight_patching",
    "task_arithmetic",
    "dare_linear",
    "task_arithmetic_per_expert",
    "localize_and_stitch_dataless",
    "task_arithmetic+aim",
)
GRID = {
    "weight_patching": {"lambda": [0.5, 1.0]},
    "task_arithmetic": {"weight": [0.3, 0.8]},
    "dare_linear": {"weight": [0.5], "density": [0.5, 0.8]},
    "task_arithmetic_per_expert": {"weight": [0.2, 0.9]},
    "localize_and_stitch_dataless": {"sparsity": [0.1, 0.7]},
}
#: how far the bar of one process went
DONE: list[float] = []
#: a rule by which merges differ, which is in a file of the user's own
CHECKER = """
def sum_of_letters(item, output):
    return sum(map(ord, output)) % 7 / 6
"""


@pytest.fixture(autouse=True)
def same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(merging, "perf_counter", lambda: 0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    family = Family.make(root, llama_config(vocab_size=40))
    for model in (family.base, *family.experts):
        save_tokenizer(model.path)
    dated = family.experts[1].path / "tokenizer_config.json"  # which only its own worker reads
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    dated.write_text(json.dumps(json.loads(dated.read_text()) | {"chat_template": template}))
    (root / "recipe.yml").write_text(yaml.safe_dump(family.recipe()))
    other = family.recipe() | {"merge_method": "ties"}
    other["models"] = [
        {"model": m["model"], "parameters": {"weight": 1.0}} for m in other["models"]
    ]
    (root / "ties.yml").write_text(yaml.safe_dump(other))
    (root / "broken.yml").write_text(yaml.safe_dump(other | {"merge_method": "nearswap"}))
    for name, prompts in (("one", "abc"), ("two", "hgf")):
        lines = [
            {"prompt": p + q, "checker": "sum_of_letters", "split": split}
            for p in prompts
            for q in "kl"
            for split in ("valid", "test")
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (root / "rules.py").write_text(CHECKER)
    (root / "grid.yml").write_text(yaml.safe_dump(GRID))
    write_prompts(root / "calibration.jsonl", 3)
    (root / "plain.txt").write_text("mnopqr" * 6)
    return root


def run(world: Path, out: Path, said: Quiet | None = None, **options: Any) -> dict[str, bytes]:
    """All that a comparison writes."""
    given: dict[str, Any] = {
        "recipes": tuple(world / f"{name}.yml" for name in ("recipe", "ties", "broken")),
        "tasks": (str(world / "one.jsonl"), str(world / "two.jsonl")),
        "methods": METHODS,
        "grid": world / "grid.yml",
        "calibration": world / "calibration.jsonl",
        "checkers": world / "rules.py",
        "keep": (str(world / "plain.txt"),),
        "relative": True,
        "repeats": 2,
        "max_new_tokens": 3,
        "device": "cpu",
        "out": out,
        **options,
    }
    compare(CompareRequest(**given), said or Quiet())
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, bytes]]:
    """The files of one process."""
    found: dict[str, bytes] = {}

    def made() -> dict[str, bytes]:
        if not found:
            said = Quiet()
            found.update(run(world, tmp_path_factory.mktemp("alone"), said))
            DONE.append(said.done)
        return found

    return made


@dataclass
class Spread:
    """A comparison by some workers: its files, and what was made of it in the driver."""

    files: dict[str, bytes]
    ray: LocalRay
    done: float
    here: set[str]


@pytest.fixture(scope="module")
def spread(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Spread]:
    """By so many workers."""
    found: dict[int, Spread] = {}

    def of(cpus: int) -> Spread:
        if cpus in found:
            return found[cpus]
        here, evaluate = set[str](), running.evaluate

        def seen(load: Any, jobs: Any, *rest: Any) -> None:
            here.add(jobs[0][1].model)
            evaluate(load, jobs, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "evaluate", seen)
            ray, said = on(patch, LocalRay(cpus)), Quiet()
            written = run(world, tmp_path_factory.mktemp("spread"), said, ray=True)
        found[cpus] = Spread(written, ray, said.done, here)
        return found[cpus]

    return of


@pytest.mark.parametrize("cpus", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_any_number_of_workers_write_the_files_of_one_process(
    cpus: int, alone: Callable[[], dict[str, bytes]], spread: Callable[[int], Spread]
) -> None:
    want = alone()
    summary = json.loads(want["summary.json"])
    assert len({row["mean"]["value"] for row in summary["rows"] if row["mean"]}) > 5
    again = [row for row in summary["rows"] if row["equal"] and row["valid"] is not None]
    assert any(row["equal"]["setting"] != row["setting"] for row in again), "further tests"
    assert b"template date" in want["comparison.json"]
    assert b'"failed":"' in want["results.jsonl"], "a recipe that fails is among them"
    found = spread(cpus)
    assert found.files == want
    assert found.here == {"task_arithmetic_per_expert"}, "all else is the workers'"
    assert found.ray.at_once == cpus
    assert found.done == DONE[0]


def test_a_killed_workers_models_are_made_again(
    world: Path,
    alone: Callable[[], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, said = on(monkeypatch, LocalRay(2, lambda number: number == 3)), Quiet()
    assert run(world, tmp_path, said, ray=True) == alone()
    assert ray.started == 3
    assert sum("a worker has ended; its part" in note for note in said.notes) == 1


def test_a_killed_driver_goes_on(
    world: Path,
    alone: Callable[[], dict[str, bytes]],
    spread: Callable[[int], Spread],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL."""

    add, count = Results.add, 0

    def die(*given: Any) -> None:
        nonlocal count
        add(*given)
        count += 1
        if count == 11:  # of two tasks, one
            raise Killed

    on(monkeypatch, LocalRay(2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Results, "add", die)
        run(world, tmp_path / "out", ray=True)
    ray = on(monkeypatch, LocalRay(2))
    assert run(world, tmp_path / "out", ray=True) == alone()
    assert ray.jobs < spread(4).ray.jobs


def test_a_model_that_ends_its_workers_is_given_up(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, LocalRay(1, lambda number: number > 2))
    with pytest.raises(ChildProcessError, match=f" ended {ATTEMPTS} workers; what is done is kept"):
        run(world, tmp_path, ray=True)
    assert (tmp_path / "results.jsonl").exists()


def test_a_worker_refuses_other_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluation.fingerprint
    monkeypatch.setattr(evaluation, "fingerprint", lambda plan: own(plan) | {"base": "other"})
    on(monkeypatch, LocalRay(1))
    with pytest.raises(UserError, match="^base: others on .*; all machines have to read the same"):
        run(world, tmp_path, ray=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(evaluation.WORKER)]


def test_what_a_killed_worker_leaves_is_cleared_away(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left:
        def __init__(self, prefix: str, dir: Path) -> None:
            self.name = mkdtemp(prefix=prefix, dir=dir)
            made.append(self.name)

    made: list[str] = []
    monkeypatch.setattr(evaluation, "TemporaryDirectory", Left)
    on(monkeypatch, LocalRay(2))
    run(world, tmp_path, ray=True, methods=("weight_patching",), untuned=True, grid=None)
    assert len(made) == 2 and not any(Path(place).exists() for place in made)


def line(world: Path, out: Path, *more: str) -> list[str]:
    tasks = [f"--task={world / name}.jsonl" for name in ("one", "two")]
    usual = ["--max-new-tokens=3", "--device=cpu", f"--checkers={world / 'rules.py'}"]
    methods = "--methods=weight_patching,task_arithmetic,ties,dare_linear"
    return ["compare", str(world / "recipe.yml"), *tasks, *usual, methods, f"--out={out}", *more]


def test_without_ray_the_extra_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        main(line(world, tmp_path / "out", "--ray"))
    assert stop.value.code == 2
    assert capfd.readouterr().err.strip() == (
        "mergekit-wp: --ray needs Ray, which is not installed: pip install 'mergekit-wp[ray]'"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_two_workers_one_killed_then_the_driver(world: Path, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert started(line(world, alone), ray_environment()).wait() == 0
    process = started(line(world, spread, "--ray"), ray_environment())
    while len(victims := list(workers_of(process.pid))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

    def await_lines(count: int) -> None:
        results = spread / "results.jsonl"
        while not results.exists() or len(results.read_text().splitlines()) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)

    await_lines(12)
    os.kill(victims[0], signal.SIGKILL)
    await_lines(200)
    assert "a worker has ended; its part " in killed(process)
    again = started(line(world, spread, "--ray"), ray_environment())
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert files(spread) == files(alone)
