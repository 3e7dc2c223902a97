"""What a run says of itself away from a terminal."""

from __future__ import annotations

import sys

import pytest

from mergekit_wp.runs import progress


def test_a_line_a_minute_over_all_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages of half a minute, of which none alone would say anything."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with progress.BarProgress() as bar:
        for stage in ("comparing", "hashing", "answering"):
            bar.stage(stage, 3, "tensor")
            for _ in range(3):
                now[0] += 10
                bar.advance(1)
        bar.stage("soon done", 1, "tensor")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("%")[0] for line in lines] == ["hashing: 100"]
    now[0] += 60
    with progress.BarProgress() as bar:
        now[0] += 60
        bar.stage("begins", 4, "prompt")
        bar.advance(2, resumed=True)
    assert "begins:   0%" in capsys.readouterr().err


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
