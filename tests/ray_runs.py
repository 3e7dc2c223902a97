"""Commands in processes of their own, and the Ray workers below them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest


@cache
def ray_environment() -> dict[str, str]:
    """What such a process is started with, once Ray has shown that it starts; skips without it."""
    pytest.importorskip("ray", reason="pip install 'mergekit-wp[ray]'")
    # Ray's own processes use what is deprecated, and would end by our filters
    ours = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    # a cluster of its own: one that another test holds on this machine ends with that test
    ours["RAY_ADDRESS"] = "local"
    environment = os.environ | ours
    # Ray gives up after 30 s, which its first start from a cold disk may take beside other tests
    start = [sys.executable, "-c", "import ray; ray.init(include_dashboard=False)"]
    for _ in range(5):
        if subprocess.run(start, env=environment, capture_output=True).returncode == 0:
            break
    return environment


def started(
    arguments: list[str], environment: dict[str, str], *, shown: bool = False
) -> subprocess.Popen[str]:
    """A command that runs; what it prints can be read where it is to be shown."""
    return subprocess.Popen(
        [sys.executable, "-m", "mergekit_wp.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if shown else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def workers_of(driver: int) -> Iterator[int]:
    """Processes that are at a job or idle, as Ray titles them, below a driver."""
    listed = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True).stdout
    for line in listed.splitlines()[1:]:
        pid, session, name = line.split(None, 2)
        if int(session) == driver and name.startswith("ray::Worker"):
            yield int(pid)


def killed(driver: subprocess.Popen[str]) -> str:
    """End a driver at once, and say what it said."""
    driver.kill()
    return driver.communicate()[1]
