"""The whole benchmark in order, through the public commands; what exists is not made again.

Run it from the repository's root: ``python -m benchmarks.smollm2.run``.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.files import IFEVAL, REPO, command
from benchmarks.smollm2.paths import BASE, BUILD, EXPERT, PROMPTS, SCORES

HERE = "benchmarks/smollm2"


@dataclass(frozen=True)
class Step:
    """A command, and the file or folder that shows it has been run (None: always run it)."""

    line: str
    makes: Path | None = None


def chain(ifeval: Path, scoring: str) -> list[Step]:
    """Every command of the benchmark."""
    python = "python -m benchmarks.smollm2"
    base, caps, scores = (path.relative_to(REPO) for path in (BASE, EXPERT, SCORES))
    build, prompts = BUILD.relative_to(REPO), PROMPTS.relative_to(REPO)
    merges = [
        Step(f"mergekit-wp merge {HERE}/{recipe}.yml {build}/{out}", BUILD / out / "config.json")
        for recipe, out in (("recipe", "merged"), ("ties", "ties"))
    ]
    folders = f"{base} {caps} {build}/merged {build}/ties"
    return [
        Step(f"{python}.fetch", BASE),
        Step(f"{python}.prompts --ifeval {shlex.quote(str(ifeval))}", PROMPTS / "train.jsonl"),
        Step(f"{python}.train", EXPERT),
        Step(
            f"mergekit-wp score {base} {caps} --prompts {prompts}/score.jsonl "
            f'--behavior "all capital letters" --out {scores} {scoring}',
            SCORES,
        ),
        Step(f"mergekit-wp inspect {scores} --estimand share --criterion kl --top 10"),
        Step(f"mergekit-wp plot {scores} --out {build}/caps.png", BUILD / "caps.png"),
        *merges,
        Step(f"{python}.evaluate {folders} --n 32 --json {build}/test.json", BUILD / "test.json"),
        Step(
            f"{python}.evaluate {base} {caps} {build}/merged --prompts {prompts}/ifeval.jsonl "
            f"--json {build}/ifeval.json",
            BUILD / "ifeval.json",
        ),
        Step(f"{python}.restore --n 24", BUILD / "restore.png"),
    ]


def run(steps: Sequence[Step]) -> None:
    """Run each step whose product is missing, and say how long it took."""
    start = time.monotonic()
    for step in steps:
        if step.makes is not None and step.makes.exists():
            click.secho(f"[done before] {step.line}", dim=True)
            continue
        click.secho(f"$ {step.line}", bold=True)
        begin = time.monotonic()
        command(*shlex.split(step.line))
        click.echo(f"[{time.monotonic() - begin:.0f} s]")
    click.echo(f"all steps: {(time.monotonic() - start) / 60:.1f} min")


@click.command()
@click.option("--ifeval", type=click.Path(exists=True, path_type=Path), default=IFEVAL)
@click.option(
    "--scoring",
    default="--estimand share --criterion kl --max-prompts 16 --max-new-tokens 32",
    show_default=True,
    help="Options of `mergekit-wp score`.",
)
@click.option("--keep", is_flag=True, help="Keep the merged checkpoints.")
def main(ifeval: Path, scoring: str, keep: bool) -> None:
    """Fetch, train, score, merge, evaluate and restore."""
    run(chain(ifeval, scoring))
    if not keep:
        for name in ("merged", "ties"):
            shutil.rmtree(BUILD / name, ignore_errors=True)


if __name__ == "__main__":
    main()
