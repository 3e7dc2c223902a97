"""Jointly fitted gates of the real experts, beside what scores alone reach.

``python -m benchmarks.smollm2.fitting`` (from the repository's root) fits the component gates of
every combination with `mergekit-wp fit`, with guards and without, and one gate a tensor where it is
asked for; merges, measures and prints the table of README.md. Everything is kept in
build/smollm2/fitting and resumes.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import IFEVAL, REPO, command, device, read_jsonl, write_jsonl
from benchmarks.fitting import fit_by_tensor
from benchmarks.items import split_of
from benchmarks.perplexity import perplexity, ratio, surprise
from benchmarks.smollm2.bench import COMBINATIONS, HERE, local, prepare
from benchmarks.smollm2.ifeval import identity, request_of
from benchmarks.smollm2.paths import BASE, BUILD
from benchmarks.smollm2.perplexity import plain_texts
from benchmarks.smollm2.skills import code, instruction, math
from benchmarks.smollm2.tasks import (
    COUNTS,
    MAX_NEW_TOKENS,
    SKILLS,
    base_answers,
    task_line,
    unique,
)
from benchmarks.zoo.bench import Silent
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

FOLDER = BUILD / "fitting"
GUARDS = (FOLDER / "requests.jsonl", FOLDER / "text.jsonl")
LEAK = FOLDER / "unasked.jsonl"
#: prompts of each behaviour and guard (code has 122), and how the gates climb
N, START, STEPS, A_STEP = 64, 0.7, 20, 8
#: of the guards, and a wider one
LIMIT, WIDER = 1.02, 1.1
#: the combination that is also fitted with a wider limit and none, and with one gate a tensor
HARD = ("instruction", "math")


def write_data() -> None:
    """Prompts; guards (requests with the base's answers, running text); test requests unasked."""
    answers = base_answers(BUILD / "data" / "base-answers.jsonl")
    streams = {
        "instruction": instruction.items("score", 0, answers["score"]),
        "math": math.items("score", 0),
        "code": code.items("score", 0),
    }
    for skill, stream in streams.items():
        write_jsonl(taught(skill), [{"prompt": item.prompt} for item in unique(stream, N)])
    plain = [pair for split in ("score", "train") for pair in sorted(answers[split].items())]
    asked = [{"prompt": p, "response": a} for p, a in plain if a.strip()]
    write_jsonl(GUARDS[0], asked[:N])
    known = set(plain_texts(read_jsonl(IFEVAL)))
    texts = []
    for row in read_jsonl(IFEVAL):
        request = request_of(row["prompt"])
        learnt = request is not None and split_of(identity(request)) in ("train", "score")
        if learnt and row["prompt"].strip() not in known:
            texts.append(" ".join(row["prompt"].split(" ")[:60]))
    chosen = sorted(dict.fromkeys(texts), key=len)[-N:]
    write_jsonl(GUARDS[1], [{"prompt": "Continue.", "response": text} for text in chosen])
    items = unique(instruction.items("test", 0, answers["test"]), COUNTS["test"])
    lines = [task_line(i, "test", item) for i, item in enumerate(items)]
    asked = [line | {"prompt": item.contrast} for line, item in zip(lines, items, strict=True)]
    write_jsonl(LEAK, asked)


def taught(skill: str) -> Path:
    """Its unlabelled prompts: the expert's own answers are taken."""
    return FOLDER / "prompts" / f"{skill}.jsonl"


def recipe_of(experts: tuple[str, ...]) -> Path:
    """A recipe that names the experts."""
    path = FOLDER / "experts" / f"{'-'.join(experts)}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    models = [{"model": local(BUILD / "experts" / e)} for e in experts]
    data = {"merge_method": "task_arithmetic", "base_model": local(BASE), "models": models}
    path.write_text(yaml.safe_dump(data))
    return path


def fitted(experts: tuple[str, ...], limit: float | None) -> Path:
    """The recipe that merges by fitted gates; what guards allow, None is no guard."""
    out = FOLDER / f"{'-'.join(experts)}-{limit or 'unguarded'}"
    if not (out / "recipe.yml").exists():
        pairs = [f"{e}={local(taught(e))}" for e in experts]
        guarding = [part for g in GUARDS for part in ("--guard", local(g))]
        guarding = [*guarding, "--limit", f"{limit:g}"] if limit else ["--unguarded"]
        began = time.monotonic()
        command(
            *("mergekit-wp", "fit", local(recipe_of(experts)), "--out", local(out)),
            *(part for pair in pairs for part in ("--prompts", pair)),
            *(*guarding, "--start", str(START), "--steps", str(STEPS)),
            *("--prompts-a-step", str(A_STEP), "--max-new-tokens", str(MAX_NEW_TOKENS)),
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        cost = {"seconds": time.monotonic() - began, "peak_kib": peak}
        (out / "cost.json").write_text(json.dumps(cost))
    return out / "recipe.yml"


def by_tensor(experts: tuple[str, ...], limit: float | None) -> Any:
    """The model of gates fitted alike, one a tensor."""
    request = FitRequest(
        recipe=recipe_of(experts),
        prompts=tuple((e, taught(e)) for e in experts),
        guards=GUARDS if limit else (),
        unguarded=limit is None,
        limit=limit or LIMIT,
        out=FOLDER / "by-tensor",
        steps=STEPS,
        prompts_a_step=A_STEP,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return fit_by_tensor(request, START, Silent())[0]


def measure(model: Any, skills: tuple[str, ...]) -> dict[str, Any]:
    """Test scores, rule kept though not asked for, and surprise by plain text."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    asked = TextInterface.of(BASE, tokenizer)
    model = model.to(device(), torch.float32).eval()
    checkers = Checkers.load(REPO / HERE / "checkers.py")
    found: dict[str, Any] = {
        "surprise": surprise(model, tokenizer, plain_texts(read_jsonl(IFEVAL))).tolist()
    }
    for skill in skills:
        path = LEAK if skill == "unasked" else BUILD / "tasks" / f"{skill}.jsonl"
        task = JsonlTask.read(path, checkers)
        found[skill] = [x.score for x in task.evaluate(model, asked, "test")]
    return found


def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before, or now."""
    path = FOLDER / "measured" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.dumps(make())
        path.write_text(found)
    return dict(json.loads(path.read_text()))


def load(folder: Path) -> Any:
    """A checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged(recipe: Path, skills: tuple[str, ...]) -> dict[str, Any]:
    """Merge, measure, remove."""
    with TemporaryDirectory(dir=BUILD) as scratch:
        out = Path(scratch) / "merged"
        command("mergekit-wp", "merge", local(recipe), str(out), "--quiet", quiet=True)
        return measure(load(out), skills)


def relative(
    found: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float, float]:
    """Mean over skills relative to their experts, with its 95% bootstrap interval over items."""
    rng = np.random.default_rng(0)
    value, draws = [], []
    for skill, expert in experts.items():
        ours, theirs = np.array(found[skill]), np.array(expert[skill])
        chosen = rng.integers(len(ours), size=(2000, len(ours)))
        value.append(ours.mean() / theirs.mean())
        draws.append(ours[chosen].mean(1) / theirs[chosen].mean(1))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean(value)), float(low), float(high)


def unasked(found: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
    """How often the rule is kept though not asked for: all six, and capitals alone."""
    if "unasked" not in found:
        return "|"
    capitals = [
        score
        for score, line in zip(found["unasked"], lines, strict=True)
        if line["instruction_id_list"] == ["change_case:english_capital"]
    ]
    return f"{np.mean(found['unasked']):.2f} | {np.mean(capitals):.2f}"


@click.command()
@click.option("--only", help="Only this combination, e.g. instruction-math.")
def main(only: str | None) -> None:
    """Fit, merge, measure, print."""
    prepare()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not LEAK.exists():
        write_data()
    lines = read_jsonl(LEAK)
    base = kept("base", lambda: measure(load(BASE), (*SKILLS, "unasked")))
    experts = {
        e: kept(e, lambda e=e: measure(load(BUILD / "experts" / e), (e, "unasked"))) for e in SKILLS
    }
    rows = {"base": base} | {f"expert {e}": found for e, found in experts.items()}
    means: dict[str, str] = {}
    # the hard pair's other fits come last
    for combination, closer in [*((c, False) for c in COMBINATIONS), (HARD, True)]:
        name = "-".join(combination)
        if only is not None and only != name:
            continue
        skills = (*combination, "unasked")
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "fit": lambda c=combination, s=skills: merged(fitted(c, LIMIT), s)
        }
        if combination == HARD and closer:
            for g, word in ((WIDER, f"limit {WIDER:g}"), (None, "no guards")):
                makers[f"fit, {word}"] = lambda c=combination, s=skills, g=g: merged(
                    fitted(c, g), s
                )
            for g, word in ((LIMIT, ""), (None, ", no guards")):
                makers[f"fit, one gate a tensor{word}"] = lambda c=combination, s=skills, g=g: (
                    measure(by_tensor(c, g), s)
                )
        for label, make in makers.items():
            key = f"{' + '.join(combination)}: {label}"
            rows[key] = kept(f"{name}-{label.replace(', ', '-').replace(' ', '-')}", make)
            value, low, high = relative(rows[key], {e: experts[e] for e in combination})
            means[key] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    first = np.array(base["surprise"])
    click.echo(
        "| model | relative to the experts | "
        + " | ".join(SKILLS)
        + " | perplexity, x base | unasked: any rule | capitals |"
    )
    click.echo("|---|---:|" + "---:|" * (len(SKILLS) + 3))
    for name, found in rows.items():
        cells = [f"{np.mean(found[s]):.2f}" if s in found else "" for s in SKILLS]
        surprised = np.array(found["surprise"])
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*ratio(surprised, first)))
        cells.append(unasked(found, lines))
        click.echo(f"| {name} | {means.get(name, '')} | " + " | ".join(cells) + " |")
    click.echo(f"\nthe base's perplexity: {perplexity(first):.1f}")


if __name__ == "__main__":
    main()
