"""The benchmark of steps of experts together, small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.engine import joint_steps
from benchmarks.engine.joint_steps import STAGE, Steps, Task, main, run, table
from mergekit_wp.costs.work import Costs, Stage, Work

torch.set_num_threads(1)
STEP = re.compile(
    r"fit: (\S+) s a step, (\S+) s of it mixing, (\S+ \w)FLOP "
    r"\(computed (\S+ \w)FLOP\), \S+% of the matrix product's throughput, peak"
)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole experts", "adapters"])
def test_all_of_a_tiny_shape(tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted is what `--dry-run` says, and of the time of a step mixing is a part.

    What is not said: one prompt goes forward first, to see whether attention allows packing.
    """
    run("tiny", 2, rank, "cpu", "float32", Task(4, 16, 1, profile=not rank), tmp_path)
    said = capsys.readouterr().out
    [(seconds, mixing, real, computed)] = STEP.findall(said)
    assert 0 < float(mixing) < float(seconds)
    (flops, unit), (expected, same) = real.split(), computed.split()
    assert unit == same and float(flops) == pytest.approx(float(expected), rel=0.05)
    assert said.count("Self CPU time total") == (0 if rank else 1)
    assert "3 LoRA adapters of rank 2" in said if rank else "3 whole experts" in said
    assert ("merge: not of adapters" in said) == bool(rank)
    assert (tmp_path / "merged" / "model.safetensors").exists() != bool(rank)


def test_steps_after_the_first_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first, nor a look at where a fit starts, nor the one that is profiled."""
    clock = iter([10.0, 12.0, 16.0, 99.0])
    monkeypatch.setattr(joint_steps.time, "perf_counter", lambda: next(clock))
    steps = Steps(Task(4, 16, 2, profile=True))
    steps.stage("comparing", 7, "tensor")
    steps.advance(7)
    steps.stage(STAGE, 16, "prompt")
    steps.counting.total = 5  # of a look
    steps.note("after 0 steps, answers reproduced: inst 0.10")
    torch.ones(2, 3) @ torch.ones(3, 4)
    for _ in range(8):
        steps.advance(2)
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert steps.ends == [10.0, 12.0, 16.0, 99.0]
    # one product before the first half of the first step, one after it
    assert steps.counting.total == 2 * 2 * 2 * 3 * 4
    steps.costs = Costs((Stage(STAGE, Work(forward=400.0)),), (), 0.0)
    steps.mixes = [(9.0, 7.0), (11.0, 1.0), (98.0, 5.0)]  # when each was done
    said = steps.said(throughput=64.0)
    assert said.startswith("3 s a step, 0.5 s of it mixing, ") and "50.0% of the matrix" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--steps 0", "argument --steps: expected a whole number, at least 1"),
        ("--depth many", "argument --depth: expected a whole number, at least 1"),
        ("--rank -1", "argument --rank: expected a whole number, at least 0"),
        ("--cache lots", "--cache lots: expected a size, as in 20GiB"),
        ("--table --reading 0", "--throughput and --reading are above 0"),
        ("--device abacus", "abacus"),
        ("--shape tiny --device cpu", "give a smaller --depth, or --rank for adapters"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    options: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint_steps, "disk_usage", lambda _: type("Disk", (), {"free": 100_000}))
    with pytest.raises(SystemExit) as refused:
        main(options.split())
    assert refused.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_computed_table_reads_more_slowly_from_slower_files() -> None:
    """A step of an 8B model reads the base and three experts, and both sides of differences."""
    [fast, slow] = [
        next(line for line in table(32, 128, 450e12, reading).splitlines() if "3-8b" in line)
        for reading in (1e20, 10e9)
    ]
    # ten times 8.03e9 numbers of two bytes
    assert "150 GiB read, 0.45 s" in fast and "150 GiB read, 17 s" in slow
    assert float(slow.split("|")[4].split()[0]) < float(fast.split("|")[4].split()[0]) == 450
    adapters = [line for line in table(32, 128, 450e12, 1e20).splitlines() if "rank 16" in line]
    assert "15 GiB read" in adapters[1]  # only the base
