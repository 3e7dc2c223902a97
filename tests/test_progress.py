"""What a run says of itself away from a terminal."""

from __future__ import annotations

import sys
import time

import pytest

from mergekit_wp.runs import progress


def test_a_line_a_minute_over_all_stages_whatever_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short stages, of which none would say anything, and one that counts nothing for long."""
    monkeypatch.setattr(progress, "EVERY", 0.2)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with progress.BarProgress() as bar:
        for stage in ("comparing", "hashing", "answering"):
            bar.stage(stage, 3, "tensor")
            for _ in range(3):
                bar.advance(1)
        assert not capsys.readouterr().err
        bar.stage("base on guard", 4, "prompt")
        bar.advance(2, resumed=True)
        time.sleep(0.7)
        lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3 and all(line.startswith("base on guard:  50%") for line in lines)
    time.sleep(0.3)
    assert not capsys.readouterr().err, "nothing is said any more"


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
