"""Sources, routers and executors of the SmolLM2 instruction expert.

``python -m benchmarks.mechanism.bench`` runs every step that has not run yet and prints the tables
of README.md; with names of steps it runs these alone. Everything resumes. The base and the expert
come from ``python -m benchmarks.smollm2.experts``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.mechanism import tables
from benchmarks.mechanism.paths import (
    BASE,
    BEHAVIORS,
    EXPERT,
    HELD_OUT,
    OTHER_SEED,
    PROMPTS,
    RANKINGS,
    SCORES,
    SKILL,
    TASK,
    TRACE,
    WORK,
    behavior_scores,
    verified,
)
from benchmarks.smollm2.experts import build, train
from benchmarks.smollm2.paths import BUILD, command, read_jsonl, write_jsonl
from mergekit_wp.runs.progress import BarProgress
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score as run_score

#: scored on, and as many held out; items of which the answers are checked; of an anchor
N_PROMPTS, N_ITEMS, N_ANCHOR = 8, 12, 8
#: less than what `score` allows for exact swaps, so that heads are scored to first order and only
#: the leaders and a sample verified
EXACT = 64.0
TOP = "1%,5%,20%"
SCORED = ("--prompts", str(PROMPTS), "--max-prompts", str(N_PROMPTS))


def prompts() -> None:
    """Prompts and items that are not scored on."""
    lines = PROMPTS.read_text().splitlines(keepends=True)
    WORK.mkdir(parents=True, exist_ok=True)
    HELD_OUT.write_text("".join(lines[N_PROMPTS : 2 * N_PROMPTS]))
    items = [row for row in read_jsonl(SKILL) if row["split"] == "test"][:N_ITEMS]
    write_jsonl(TASK, [row | {"max_new_tokens": 32} for row in items])


def score() -> None:
    """Weights and activations, gain and knockout, and shares."""
    if not SCORES.exists():
        request = ScoreRequest(
            base=str(BASE),
            expert=str(EXPERT),
            prompts=PROMPTS,
            out=SCORES,
            max_prompts=N_PROMPTS,
            estimand=("share", "gain", "activation_gain", "knockout", "activation_knockout"),
            criterion=("kl", "anchor"),
            kinds=("layer", "head", "kv_group", "neuron"),
            verify=24,
            exact_budget=EXACT,
        )
        run_score(request, BarProgress())


def trace() -> None:
    """Who supplies the leading components."""
    if not TRACE.exists():
        command(
            *("mergekit-wp", "trace", str(SCORES), *SCORED),
            *("--criterion", "kl", "--out", str(TRACE)),
        )


def verify() -> None:
    """Sets of weights chosen by each ranking, on prompts that were not scored on."""
    for estimand in RANKINGS:
        out = verified(estimand)
        if out.exists():
            continue
        working = out.with_suffix(".working")
        if not working.exists():
            shutil.copy(SCORES, working)
        answers = ("--task", str(TASK)) if estimand == "share" else ()
        command(
            *("mergekit-wp", "verify", str(working), "--top", TOP, "--prompts", str(HELD_OUT)),
            *("--estimand", estimand, "--criterion", "kl", "--draws", "2", *answers),
        )
        os.replace(working, out)


def anchors() -> None:
    """Every layer's anchor for the six built-in behaviours."""
    for name in BEHAVIORS:
        out = WORK / f"anchor-{name}.json"
        if not out.exists():
            found = command(
                *("mergekit-wp", "anchor", str(BASE), str(EXPERT), "--builtin", name),
                *("--max-prompts", str(N_ANCHOR), "--max-new-tokens", "32", "--json"),
                quiet=True,
            )
            out.write_text(found)


def behaviors() -> None:
    """Shares of the six built-in behaviours, and of the same behaviour on other prompts."""
    for name in BEHAVIORS:
        file = WORK / f"{name}.jsonl"
        if not file.exists():
            command("mergekit-wp", "behaviors", name, "--out", str(file))
        _shares(EXPERT, file, behavior_scores(name), name)
    _shares(EXPERT, HELD_OUT, behavior_scores("other-prompts"), "instruction")


def _shares(expert: Path, file: Path, out: Path, behavior: str) -> None:
    if not out.exists():
        command(
            *("mergekit-wp", "score", str(BASE), str(expert), "--prompts", str(file)),
            *("--max-prompts", str(N_PROMPTS), "--estimand", "share", "--criterion", "kl"),
            *("--kinds", "layer,head,kv_group,neuron", "--behavior", behavior, "--out", str(out)),
            *("--max-new-tokens", "32"),
        )


def seed() -> None:
    """A second training seed of the expert, and its shares on the same prompts."""
    if not (OTHER_SEED / "config.json").exists():
        adapter = WORK / "adapter-seed1"
        train("instruction", 1, BUILD / "data", adapter)
        build(adapter, OTHER_SEED)
    _shares(OTHER_SEED, PROMPTS, behavior_scores("other-seed"), "instruction")


def stability() -> None:
    """Compare the rankings, and draw the page."""
    others = [behavior_scores(name) for name in ("other-prompts", *BEHAVIORS, "other-seed")]
    file = verified("share")
    command("mergekit-wp", "stability", str(file), *map(str, others), quiet=True)
    command(
        *("mergekit-wp", "plot", str(file), "--trace", str(TRACE)),
        *("--out", str(WORK / "instruction.html")),
    )


STEPS: dict[str, Callable[[], None]] = {
    "prompts": prompts,
    "score": score,
    "trace": trace,
    "verify": verify,
    "anchors": anchors,
    "behaviors": behaviors,
    "seed": seed,
    "stability": stability,
    "tables": lambda: click.echo(tables.everything()),
}


@click.command()
@click.argument("steps", nargs=-1, type=click.Choice(list(STEPS)))
def main(steps: tuple[str, ...]) -> None:
    """Run STEPS, or all of them in order."""
    for name in steps or STEPS:
        STEPS[name]()


if __name__ == "__main__":
    main()
