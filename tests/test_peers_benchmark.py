"""The benchmark of the engine against the tools people use, small."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import peers
from benchmarks.engine.inputs import Inputs, cases, open_case
from benchmarks.engine.peers import PEERS, SWEEPS, Contest, contest, contestants, table
from benchmarks.files import REPO

torch.set_num_threads(1)
#: what has to be installed for each
NEEDS = {"TransformerLens": "transformer_lens", "nnsight": "nnsight"}


def zoo() -> Inputs:
    return open_case(cases()["zoo"], 3, torch.float32, "cpu")


@pytest.mark.parametrize("sweep", ["activations", "weights"])
def test_plain_hooks_and_writes_find_what_the_engine_finds(sweep: str) -> None:
    ours = contest(sweep, "mergekit-wp", zoo(), 5)
    theirs = contest(sweep, "plain PyTorch", zoo(), 5)
    assert len(theirs.gains["head"]) == 6  # of 16 heads every third
    assert theirs.difference(ours) < 1e-5
    assert max(map(abs, ours.gains["head"])) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "peer"), [(s, p) for p, (_, some) in PEERS.items() if p in NEEDS for s in some]
)
def test_a_peer_finds_what_the_engine_finds(sweep: str, peer: str) -> None:
    pytest.importorskip(NEEDS[peer], reason="pip install 'mergekit-wp[peers]'")
    arguments = ["--case", "zoo", "--n-prompts", "3", "--sample", "5", "--run", sweep, peer]
    done = subprocess.run(  # of its own, for these packages change torch when they are imported
        [sys.executable, "-m", "benchmarks.engine.peers", *arguments],
        cwd=REPO,
        stdout=subprocess.PIPE,
        check=True,
    )
    theirs = Contest(**json.loads(done.stdout.splitlines()[-1]))
    assert theirs.difference(contest(sweep, "mergekit-wp", zoo(), 5)) < 1e-5
    assert theirs.wall > 0 and theirs.peak > 2**28


def everyone(wall: float = 1.0) -> dict[tuple[str, str, int], Contest]:
    one = Contest(wall, wall, 2**30, {"head": [0.1, 0.2]})
    return {(sweep, name, 0): one for sweep in SWEEPS for name in contestants(sweep)}


def test_the_table_has_ratios_to_ours_and_refuses_other_gains() -> None:
    found = everyone()
    slow = Contest(6.0, 4.0, 2**31, {"head": [0.1, 0.20001]})
    found["weights", "nnsight", 0] = slow
    row = (
        "| exact weight swaps of all heads | nnsight | 6 s | 4 s | 2.00 GiB | 6.00 | 4.00 | 2.00 |"
    )
    assert f"{row} 1e-05 |" in table(found, 1)
    for other in (0.2002, math.nan):
        found["weights", "nnsight", 0] = replace(slow, gains={"head": [other, 0.2]})
        with pytest.raises(SystemExit, match="weight swaps of all heads: gains by nnsight differ"):
            table(found, 1)


def test_a_stopped_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def run(sweep: str, contestant: str, _options: Any) -> Contest:
        asked.append((sweep, contestant))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return everyone()[sweep, contestant, 0]

    monkeypatch.setattr(peers, "in_a_process", run)
    monkeypatch.setattr(peers, "version", lambda _package: "1")
    monkeypatch.setattr(sys, "argv", ["peers", f"--out={tmp_path}", "--repeats=1"])
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    peers.main()
    every = [(sweep, name) for sweep in SWEEPS for name in contestants(sweep)]
    assert asked == every[:3] + every[2:]
    assert "nnsight 1" in capsys.readouterr().out


def test_what_is_missing_or_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        if package == "nnsight":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(peers, "version", missing)
    monkeypatch.setattr(sys, "argv", ["peers", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match=r"nnsight is not installed; pip install -e '.\[peers\]'"):
        peers.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["peers", "--sample=0"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--sample needs at least one" in capsys.readouterr().err
