"""Sources, routers and executors of one expert: SmolLM2's instructions, or Gemma 3's reversal.

``python -m benchmarks.mechanism.bench`` runs every step that has not run yet and prints the tables
of README.md; with names of steps it runs these alone, with ``--study gemma3`` on the other model.
Everything resumes. Base and expert come from ``python -m benchmarks.smollm2.experts``, or
``python -m benchmarks.gemma3.experts --only reversal``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.files import command, local, read_jsonl, write_jsonl
from benchmarks.mechanism import tables
from benchmarks.mechanism.paths import BEHAVIORS, RANKINGS, STUDIES, Study
from mergekit_wp.runs.progress import BarProgress
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score as run_score

#: prompt pairs of an anchor, and prompts of a behaviour
N_PAIRS = 8
#: less than what `score` allows for exact swaps, so that heads are scored to first order and only
#: the leaders and a sample verified
EXACT = 64.0
TOP = "1%,5%,20%"


def prompts(study: Study) -> None:
    """Prompts and items that are not scored on."""
    study.work.mkdir(parents=True, exist_ok=True)
    rows, items = read_jsonl(study.prompts), read_jsonl(study.skill)
    others = rows[study.scored :]
    if not others:
        others = [{"prompt": row["prompt"]} for row in items if row["split"] == "valid"]
    write_jsonl(study.others, others[: study.held_out])
    tested = [row for row in items if row["split"] == "test"][: study.answered]
    write_jsonl(study.items, [r | {"max_new_tokens": study.max_new_tokens} for r in tested])


def score(study: Study) -> None:
    """Weights and activations, gain and knockout, and shares."""
    if not study.scores.exists():
        request = ScoreRequest(
            base=str(study.base),
            expert=str(study.expert),
            prompts=study.prompts,
            out=study.scores,
            max_prompts=study.scored,
            estimand=("share", "gain", "activation_gain", "knockout", "activation_knockout"),
            criterion=study.criteria,
            kinds=("layer", "head", "kv_group", "neuron"),
            verify=24,
            exact_budget=EXACT,
        )
        run_score(request, BarProgress())


def trace(study: Study) -> None:
    """Who supplies the leading components."""
    if not study.trace.exists():
        command(
            *("mergekit-wp", "trace", str(study.scores), "--prompts", str(study.prompts)),
            *("--max-prompts", str(study.scored), "--criterion", "kl", "--out", str(study.trace)),
        )


def verify(study: Study) -> None:
    """Sets of weights chosen by each ranking, on prompts that were not scored on."""
    for estimand in RANKINGS:
        out = study.verified(estimand)
        if out.exists():
            continue
        working = out.with_suffix(".working")
        if not working.exists():
            shutil.copy(study.scores, working)
        answers = ("--task", str(study.items)) if estimand == "share" else ()
        command(
            *("mergekit-wp", "verify", str(working), "--top", TOP, "--prompts", str(study.others)),
            *("--estimand", estimand, "--criterion", "kl", "--draws", "2", *answers),
        )
        os.replace(working, out)


def anchors(study: Study) -> None:
    """Every layer's anchor for the six built-in behaviours."""
    for name in BEHAVIORS if study.builtin else ():
        out = study.work / f"anchor-{name}.json"
        if not out.exists():
            found = command(
                *("mergekit-wp", "anchor", str(study.base), str(study.expert), "--builtin", name),
                *("--max-prompts", str(N_PAIRS), "--max-new-tokens", "32", "--json"),
                quiet=True,
            )
            out.write_text(found)


def behaviors(study: Study) -> None:
    """Shares of the six built-in behaviours, and of the same behaviour on other prompts."""
    for name in BEHAVIORS if study.builtin else ():
        file = study.work / f"{name}.jsonl"
        if not file.exists():
            command("mergekit-wp", "behaviors", name, "--out", str(file))
        _shares(study, study.expert, file, study.shares(name), name)
    _shares(study, study.expert, study.others, study.shares("other-prompts"), study.expert.name)


def _shares(study: Study, expert: Path, file: Path, out: Path, behavior: str) -> None:
    if not out.exists():
        command(
            *("mergekit-wp", "score", str(study.base), str(expert), "--prompts", str(file)),
            *("--max-prompts", str(max(N_PAIRS, study.held_out)), "--estimand", "share"),
            *("--criterion", "kl", "--kinds", "layer,head,kv_group,neuron"),
            *("--behavior", behavior, "--out", str(out)),
            *("--max-new-tokens", str(study.max_new_tokens)),
        )


def seed(study: Study) -> None:
    """Shares of the expert of a second training seed, on the same prompts."""
    if study.other_seed is None:
        return
    if not (study.other_seed / "config.json").exists():
        raise SystemExit(
            f"{local(study.other_seed)} is not there: python -m benchmarks.smollm2.experts --seed 1"
        )
    other = study.shares("other-seed")
    _shares(study, study.other_seed, study.prompts, other, study.expert.name)


def stability(study: Study) -> None:
    """Compare the rankings, and draw the page."""
    names = ["other-prompts", *(BEHAVIORS if study.builtin else ())]
    others = [study.shares(n) for n in [*names, *(["other-seed"] if study.other_seed else [])]]
    file = study.verified("share")
    command("mergekit-wp", "stability", str(file), *map(str, others), quiet=True)
    command(
        *("mergekit-wp", "plot", str(file), "--trace", str(study.trace)),
        *("--out", str(study.work / f"{study.expert.name}.html")),
    )


STEPS: dict[str, Callable[[Study], None]] = {
    "prompts": prompts,
    "score": score,
    "trace": trace,
    "verify": verify,
    "anchors": anchors,
    "behaviors": behaviors,
    "seed": seed,
    "stability": stability,
    "tables": lambda study: click.echo(tables.everything(study)),
}


@click.command()
@click.option("--study", type=click.Choice(list(STUDIES)), default="smollm2", show_default=True)
@click.argument("steps", nargs=-1, type=click.Choice(list(STEPS)))
def main(study: str, steps: tuple[str, ...]) -> None:
    """Run STEPS, or all of them in order."""
    for name in steps or STEPS:
        STEPS[name](STUDIES[study])


if __name__ == "__main__":
    main()
