"""What a run says of itself away from a terminal."""

from __future__ import annotations

import functools
import queue
import sys

import pytest

from mergekit_wp.runs import progress


def test_a_line_a_minute_over_all_stages_whatever_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short stages, of which none would say anything, and one that counts nothing for long."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    minutes: queue.Queue[bool] = queue.Queue()  # one for each minute, True at the end
    said = queue.Queue[None]()

    class Clock:
        def wait(self, seconds: float) -> bool:
            assert seconds == 60
            said.put(None)
            return minutes.get()

        def set(self) -> None:
            minutes.put(True)

    def a_minute() -> None:
        minutes.put(False)
        said.get(timeout=10)

    bar = progress.BarProgress()
    bar._left = Clock()  # type: ignore[assignment]
    with bar:
        said.get(timeout=10)
        for stage in ("comparing", "hashing", "answering"):
            bar.stage(stage, 3, "tensor")
            for _ in range(3):
                bar.advance(1)
        assert not capsys.readouterr().err
        a_minute()
        bar.stage("base on guard", 4, "prompt")
        bar.advance(2, resumed=True)
        a_minute()
        a_minute()
        lines = [line.partition("%")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["answering: 100", "base on guard:  50", "base on guard:  50"]
    assert not bar._minutes.is_alive() and not capsys.readouterr().err


def test_bars_may_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, disable=True))
    with progress.BarProgress() as bar:
        bar.stage("comparing", 3, "job")
        bar.advance(1, resumed=True)
    assert not capsys.readouterr().err


def test_a_stage_may_be_longer_than_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts of what is to do may be about right; tqdm drops a total that is run over."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # where bars are drawn
    with progress.BarProgress() as shown:
        shown.stage("comparing", 2, "job")
        shown.advance(1)
        shown.advance(2, resumed=True)
    assert "100%" in (drawn := capsys.readouterr().err) and "3/3 jobs" in drawn
