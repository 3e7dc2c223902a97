"""The benchmark of two workers against one process itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import workers
from benchmarks.engine.workers import STAGE, Timed, Watch, run, table


def test_a_step_is_what_those_after_the_first_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 5.0, 6.0, 8.0, 9.0, 11.0])  # two batches a step; the first opens the models
    monkeypatch.setattr(workers.time, "perf_counter", lambda: next(clock))
    watch = Watch(3)
    watch.stage("comparing", 3, "tensor")
    watch.advance(3)
    watch.stage(STAGE, 24, "prompt")
    for _ in range(6):
        watch.advance(4)
    assert watch.step == (11.0 - 5.0) / 2


def test_a_stopped_command_goes_on_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def timed(count: int, options: Any) -> Timed:
        asked.append(count)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Timed(9.0 / count + 1, 3.0 / count, "a")

    monkeypatch.setattr(workers, "in_a_process", timed)
    monkeypatch.setattr(sys, "argv", ["workers", f"--out={tmp_path}", "--repeats=1"])
    with pytest.raises(KeyboardInterrupt):
        workers.main()
    workers.main()
    assert asked == [1, 2, 2]
    said = capsys.readouterr().out
    assert "| whole command | 10 s | 5.5 s | 1.82 |\n| a step | 3 s | 1.5 s | 2.00 |" in said
    found = {f"fit {count} 0": Timed(1.0, 1.0, "a") for count in (1, 2)}
    found["fit 2 0"] = replace(found["fit 2 0"], sha256="b")
    with pytest.raises(SystemExit, match="two workers wrote other files"):
        table(found, 1)


@pytest.mark.slow
def test_a_run_on_the_zoo() -> None:
    found = run("zoo", 1, 2, 2)
    assert found.whole > found.step > 0
