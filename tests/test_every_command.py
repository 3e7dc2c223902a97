"""Every command gives the same bytes in every process, and asks no network for folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_wp.cli import _COMMANDS
from tests.every_command import COMMANDS, make_world


def run(folder: Path, seed: str) -> None:
    """In a process of its own, whose sets and hashes go another way."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.every_command"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("every")
    make_world(root / "fresh")
    worlds = []
    for seed in ("0", "1"):
        # in one place, for `compare` writes down where score files lie
        run(Path(shutil.copytree(root / "fresh", root / "world")), seed)
        worlds.append((root / "world").rename(root / seed))
    return worlds


def test_no_command_is_left_out() -> None:
    run_here = {line.split()[0] for line in COMMANDS.strip().splitlines()}
    assert run_here == set(_COMMANDS) - {"push"}  # which is nothing but the network


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(worlds: list[Path]) -> None:
    """What is written and what is printed; `run` has seen that no network was asked for."""
    one, other = ({p.relative_to(w): p for w in [w] for p in w.rglob("*")} for w in worlds)
    assert set(one) == set(other)
    files = [name for name, path in one.items() if path.is_file()]
    assert len(files) > 60
    different = [n for n in files if one[n].read_bytes() != other[n].read_bytes()]
    assert not different, different
