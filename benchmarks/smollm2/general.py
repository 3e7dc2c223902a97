"""What a merge costs beside its skills: perplexity on plain text, and the skill it lacks.

``python -m benchmarks.smollm2.general`` (after `benchmarks.smollm2.bench`) makes each merge that it
looks at, measures it and removes it; what was measured is kept in build/smollm2/general.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import IFEVAL, REPO, command, device, local, read_jsonl
from benchmarks.perplexity import perplexity, ratio, surprise
from benchmarks.smollm2.paths import BASE, BUILD, SMOLLM2
from benchmarks.smollm2.perplexity import plain_texts
from benchmarks.smollm2.tasks import SKILLS
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

RECIPES = ("weight_patching-untuned", "weight_patching", "task_arithmetic", "ties")
FOLDER = BUILD / "general"


def measure(folder: Path, texts: list[str], others: list[str]) -> dict[str, Any]:
    """Surprise by text, and test scores of the skills that are not the model's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = TextInterface.of(folder, tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(device()).eval()
    checkers = Checkers.load(REPO / SMOLLM2.here / "checkers.py")
    found: dict[str, Any] = {"surprise": surprise(model, tokenizer, texts).tolist()}
    for skill in others:
        task = JsonlTask.read(BUILD / "tasks" / f"{skill}.jsonl", checkers)
        found[skill] = [x.score for x in task.evaluate(model, asked, "test")]
    return found


def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before, or now."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return dict(json.loads(path.read_text()))


def measure_merge(recipe: Path, texts: list[str], others: list[str]) -> dict[str, Any]:
    """Merge, measure, remove."""
    with TemporaryDirectory(dir=BUILD) as scratch:
        out = Path(scratch) / "merged"
        command("mergekit-wp", "merge", local(recipe), str(out), "--quiet", quiet=True)
        return measure(out, texts, others)


@click.command()
def main() -> None:
    """Print the table."""
    texts = plain_texts(read_jsonl(IFEVAL))
    found = {"base": kept("base", lambda: measure(BASE, texts, list(SKILLS)))}
    for name in SKILLS:
        others = [s for s in SKILLS if s != name]
        found[f"expert {name}"] = kept(
            name, lambda n=name, o=others: measure(BUILD / "experts" / n, texts, o)
        )
    for experts in tqdm(SMOLLM2.combinations, unit="combination"):
        others = [s for s in SKILLS if s not in experts]
        for method in RECIPES:
            recipe = BUILD / "compare" / "-".join(experts) / "recipes" / f"{method}.yml"
            found[f"{' + '.join(experts)}: {method}"] = kept(
                f"{'-'.join(experts)}-{method}",
                lambda r=recipe, o=others: measure_merge(r, texts, o),
            )
    first = np.array(found["base"]["surprise"])
    click.echo("| model | perplexity | against the base | " + " | ".join(SKILLS) + " |")
    click.echo("|---|---:|---:|" + "---:|" * len(SKILLS))
    for name, values in found.items():
        rows = np.array(values["surprise"])
        against = "" if name == "base" else "x {:.2f} [{:.2f}, {:.2f}]".format(*ratio(rows, first))
        cells = [f"{np.mean(values[s]):.2f}" if s in values else "" for s in SKILLS]
        click.echo(f"| {name} | {perplexity(rows):.1f} | {against} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
