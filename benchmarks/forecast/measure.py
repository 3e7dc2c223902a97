"""One command in a process of its own: what was forecast, and what it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

import mergekit_wp as wp
from benchmarks.files import command, local
from benchmarks.smollm2.paths import SMOLLM2
from mergekit_wp.costs.forecast import Forecast, counted, forecast
from mergekit_wp.costs.shown import table
from mergekit_wp.models.memory import peak_memory
from mergekit_wp.runs.progress import NoProgress

#: answers that experts give, and texts that are read, are few, so that all of it takes minutes
PROMPTS, TOKENS = 8, 24
SKILLS = ("math", "code")


@dataclass(frozen=True)
class Ratio:
    """What one command was said to take, and took.

    Attributes:
        seconds, memory: said and real.
        table: the plan as `--dry-run` prints it.
    """

    seconds: tuple[float, float]
    memory: tuple[float, float]
    table: str


class Watching(NoProgress):
    """Forecasts where a run is told what is opened, and watches from there on."""

    found: Forecast | None = None
    begun = 0.0

    def plan(self, opened: object) -> None:
        """Forecast, and forget the peak so far."""
        if self.found is None:
            self.found = forecast(opened, counted(opened))
            Path("/proc/self/clear_refs").write_text("5")
            self.begun = time.perf_counter()


def watched(run: Callable[[Watching], object]) -> Ratio:
    """One command from where it knows its inputs to its end."""
    watching = Watching()
    run(watching)
    took = time.perf_counter() - watching.begun
    found = watching.found
    assert found is not None
    said = sum(part.size for part in found.memory)
    return Ratio((found.seconds, took), (said, float(peak_memory())), table(found, str))


def commands(out: Path) -> dict[str, Callable[[Watching], object]]:
    """What is measured, by name."""
    base = SMOLLM2.base
    experts = {name: SMOLLM2.expert(name) for name in SKILLS}
    prompts = {name: SMOLLM2.prompts(name) for name in SKILLS}
    few: dict[str, Any] = {"max_prompts": PROMPTS, "max_new_tokens": TOKENS, "device": "cpu"}
    one = {"prompts": prompts["math"], **few}
    scores = out / "math.safetensors"
    return {
        "score": lambda progress: wp.score(
            base, experts["math"], out=scores, kinds="layer,head,kv_group,neuron",
            progress=progress, **one,
        ),
        "fit": lambda progress: wp.fit(
            base, experts, prompts=prompts, out=out / "fit", steps=4, progress=progress, **few
        ),
        "verify": lambda progress: wp.verify(
            scores, top="1%,10%", draws=2, progress=progress, **one
        ),
    }  # fmt: skip


def measured(name: str, out: Path) -> Ratio:
    """One command, in a process of its own."""
    done = command("python", "-m", "benchmarks.forecast.measure", name, local(out), quiet=True)
    fields = json.loads(done.splitlines()[-1])
    return Ratio(tuple(fields["seconds"]), tuple(fields["memory"]), fields["table"])


@click.command()
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
def main(name: str, out: Path) -> None:
    """Run one command and print what was said and what was."""
    out.mkdir(parents=True, exist_ok=True)
    click.echo(f"{torch.get_num_threads()} threads", err=True)
    click.echo(json.dumps(asdict(watched(commands(out)[name]))))


if __name__ == "__main__":
    main()
