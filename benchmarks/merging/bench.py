"""``weight_patching`` beside mergekit's own ``ties``, on the same three experts.

They merge in turn, each time in a process of its own.

Run it from the repository's root: ``python -m benchmarks.merging.bench``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from benchmarks.merging.material import make

#: as their scripts start them
PROGRAMS = {
    "mergekit-yaml": [sys.executable, "-m", "mergekit.scripts.run_yaml"],
    "mergekit-wp merge": [sys.executable, "-m", "mergekit_wp.cli", "merge"],
}


@dataclass(frozen=True)
class Cost:
    """What one merge took: seconds, seconds of all cores, and peak resident MiB."""

    wall: float
    cpu: float
    peak: float


PARTS = ("wall", "cpu", "peak")


def measure(program: list[str], recipe: Path, out: Path, options: list[str]) -> Cost:
    """One merge in a fresh process.

    Raises:
        SystemExit: it failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        command = [*program, str(recipe), str(out), *options]
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def best(costs: list[Cost]) -> Cost:
    """The least of each: whatever else ran on the machine only adds."""
    return Cost(*(min(getattr(c, part) for c in costs) for part in PARTS))


def ratio(own: list[Cost], ties: list[Cost], part: str) -> str:
    """Ratio of the least costs, and between which it lay in the single repetitions."""
    pairs = [
        getattr(one, part) / getattr(other, part) for one, other in zip(own, ties, strict=True)
    ]
    of_best = getattr(best(own), part) / getattr(best(ties), part)
    return f"{of_best:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--program", type=click.Choice(list(PROGRAMS)), default="mergekit-yaml")
@click.option("--option", "options", multiple=True, help="Of mergekit-yaml, for all merges.")
@click.option("--only", multiple=True, help="Only these rows (and ties).")
def main(
    repeats: int, dtype: str, program: str, options: tuple[str, ...], only: tuple[str, ...]
) -> None:
    """Merge in turn, and print the least of every cost and its ratio to that of ties.

    In brackets: the least and the largest ratio of all repetitions.
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        folder = Path(scratch)
        # a child's peak is never told below its parent's at its start: nothing large is made here
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            recipes = apart.submit(make, folder, getattr(torch, dtype)).result()
        if only:
            recipes = {n: r for n, r in recipes.items() if n in (*only, "ties")}
        costs: dict[str, list[Cost]] = {name: [] for name in recipes}
        for _ in range(repeats):
            for name, recipe in recipes.items():
                given = ["--quiet", *options]
                cost = measure(PROGRAMS[program], recipe, folder / "out", given)
                costs[name].append(cost)
                click.echo(f"{name}: {cost.wall:.2f} s, {cost.cpu:.2f} s of CPU", err=True)
    click.echo(f"{program} {' '.join(options)}, {dtype}, best of {repeats}\n")
    click.echo("| | wall | CPU | peak | ratio to ties: wall | CPU | peak |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    for name, own in costs.items():
        cost = best(own)
        ratios = " | ".join(ratio(own, costs["ties"], part) for part in PARTS)
        click.echo(
            f"| {name} | {cost.wall:.1f} s | {cost.cpu:.1f} s | {cost.peak:.0f} MiB | {ratios} |"
        )


if __name__ == "__main__":
    main()
