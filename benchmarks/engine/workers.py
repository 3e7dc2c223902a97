"""Two workers of one thread against one process of one thread: experts fitted together.

    python -m benchmarks.engine.workers --case smollm2 --out build/engine/workers
    python -m benchmarks.engine.workers --case zoo --steps 4 --repeats 1 --out /tmp/workers

Every run is a process of its own and is kept as soon as it is done, so that a command that was
stopped goes on where it was. Of one that is done with, the table is printed again. Files have to be
the same, byte by byte.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.engine.inputs import ZOO
from benchmarks.files import REPO
from benchmarks.smollm2.paths import BUILD, SMOLLM2

#: of steps, the first of which opens the models, too
STAGE = "fitting gates"


@dataclass(frozen=True)
class Timed:
    """One run.

    Attributes:
        whole: seconds of the command, from the request to the files.
        step: seconds of a step, after the first.
        sha256: of the files.
    """

    whole: float
    step: float
    sha256: str


class Watch:
    """A progress that looks at the clock: when the first step was done, and when the last."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.total = self.done = 0.0
        self.first = self.last = 0.0
        self.here = False

    def stage(self, name: str, total: float, unit: str) -> None:
        """Whether it is that of the steps."""
        self.here, self.total = name == STAGE, total

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Part of a step is done."""
        if self.here:
            self.done += amount
            self.last = time.perf_counter()
            if not self.first and self.done >= self.total / self.steps:
                self.first = self.last

    def note(self, text: str) -> None:
        """Nothing is said, but where memory runs out."""
        if "memory" in text:
            print(text, file=sys.stderr)

    def plan(self, opened: object) -> None:
        """Nothing."""

    @property
    def step(self) -> float:
        """Seconds of each step after the first."""
        return (self.last - self.first) / (self.steps - 1)


def experts_of(case: str) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The base, its experts and their prompts by name."""
    if case == "smollm2":
        experts = {skill: SMOLLM2.expert(skill) for skill in SMOLLM2.skills}
        return SMOLLM2.base, experts, {skill: SMOLLM2.prompts(skill) for skill in SMOLLM2.skills}
    names = ("inst", "math", "sort")
    prompts = {name: ZOO / "prompts" / f"{name}.jsonl" for name in names}
    return ZOO / "base", {name: ZOO / name for name in names}, prompts


def run(case: str, workers: int, steps: int, prompts: int) -> Timed:
    """One run in this process, whose threads the caller has set to one."""
    from mergekit_wp.joint.fit import fit
    from mergekit_wp.joint.request import FitRequest, NamedExperts

    if workers > 1:
        import ray

        ray.init = functools.partial(ray.init, num_cpus=workers)
    base, experts, of_experts = experts_of(case)
    named = NamedExperts(base=str(base), experts=tuple((n, str(e)) for n, e in experts.items()))
    watch = Watch(steps)
    with TemporaryDirectory() as folder:
        request = FitRequest.of(
            recipe=named,
            prompts=tuple(of_experts.items()),
            out=Path(folder) / "out",
            max_prompts=prompts,
            device="cpu",
            ray=workers > 1,
            steps=steps,
            prompts_a_step=8,
        )
        begun = time.perf_counter()
        fit(request, watch)
        whole = time.perf_counter() - begun
        digest = hashlib.sha256()
        for path in sorted((Path(folder) / "out").iterdir()):
            digest.update(path.read_bytes().replace(folder.encode(), b"OUT"))
    return Timed(whole, watch.step, digest.hexdigest())


def in_a_process(workers: int, options: argparse.Namespace) -> Timed:
    """One run with a thread in every process."""
    threads = {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}
    arguments = ["--run", "--workers", str(workers), "--case", options.case]
    arguments += ["--steps", str(options.steps), "--max-prompts", str(options.max_prompts)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.workers", *arguments],
        cwd=REPO,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Timed(**json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, Timed], repeats: int) -> str:
    """As Markdown, medians over the repeats.

    Raises:
        SystemExit: two runs wrote different files.
    """
    runs = {w: [found[f"fit {w} {i}"] for i in range(repeats)] for w in (1, 2)}
    if len({one.sha256 for of in runs.values() for one in of}) > 1:
        raise SystemExit("two workers wrote other files than one process")
    lines = ["| a fit | one process | two workers | ratio |", "|---|---:|---:|---:|"]
    for label, what in (("whole command", "whole"), ("a step", "step")):
        one, two = (median(getattr(r, what) for r in runs[w]) for w in (1, 2))
        lines.append(f"| {label} | {one:.3g} s | {two:.3g} s | {one / two:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("zoo", "smollm2"), default="smollm2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=BUILD.parent / "engine" / "workers")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps needs at least two: the first one also opens the models")
    if options.run:
        one = run(options.case, options.workers, options.steps, options.max_prompts)
        print(json.dumps(asdict(one)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / f"{options.case}-{options.steps}-{options.max_prompts}.json"
    found: dict[str, Timed] = {}
    if kept.exists():
        found = {key: Timed(**one) for key, one in json.loads(kept.read_text()).items()}
    for number in range(options.repeats):
        for workers in (1, 2):  # turn about: the machine may be busier later
            key = f"fit {workers} {number}"
            if key not in found:
                found[key] = in_a_process(workers, options)
                partial = kept.with_suffix(".partial")
                partial.write_text(json.dumps({k: asdict(t) for k, t in found.items()}))
                partial.replace(kept)
    print(table(found, options.repeats))


if __name__ == "__main__":
    main()
