"""Three real experts, every combination, every method, through the public commands.

``python -m benchmarks.smollm2.bench`` (from the repository's root) makes what is missing: the base,
tasks, the experts from their cached adapters, scores, and a comparison for each combination in
build/smollm2/compare/NAME. Everything resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import yaml

from benchmarks.files import IFEVAL, REPO, command
from benchmarks.smollm2.paths import BASE, BUILD, PROMPTS
from benchmarks.smollm2.tasks import SKILLS

COMBINATIONS = (
    ("instruction", "math"),
    ("instruction", "math", "code"),
    ("instruction", "code"),
    ("math", "code"),
)
HERE = "benchmarks/smollm2"
MAX_PROMPTS = 12


def local(path: Path) -> str:
    """A path as it is typed at the repository's root."""
    return str(path.relative_to(REPO))


def prepare() -> None:
    """Base, data, experts."""
    if not BASE.exists():
        command("python", "-m", "benchmarks.smollm2.fetch")
    if not (BUILD / "tasks" / "instruction.jsonl").exists():
        command("python", "-m", "benchmarks.smollm2.tasks")
    missing = [name for name in SKILLS if not (BUILD / "experts" / name).exists()]
    if missing:
        only = [part for name in missing for part in ("--only", name)]
        command("python", "-m", "benchmarks.smollm2.experts", *only)
    every = [(PROMPTS / f"{name}.jsonl").read_text() for name in SKILLS]
    (BUILD / "calibration.jsonl").write_text("".join(every))


def write_recipe(path: Path, experts: Sequence[str], scores: Sequence[Path]) -> None:
    """A weight-patching recipe of default parameters."""
    data = {
        "merge_method": "weight_patching",
        "base_model": local(BASE),
        "models": [
            {"model": local(BUILD / "experts" / e), "parameters": {"scores": local(file)}}
            for e, file in zip(experts, scores, strict=True)
        ],
        "dtype": "float32",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def score(experts: Sequence[str]) -> tuple[Path, Path]:
    """Scores in company, and alone; the recipes that merge by them."""
    name = "-".join(experts)
    alone = [BUILD / "alone" / f"{e}.safetensors" for e in experts]
    for expert, file in zip(experts, alone, strict=True):
        if not file.exists():
            command(
                *("mergekit-wp", "score", local(BASE), local(BUILD / "experts" / expert)),
                *("--prompts", local(PROMPTS / f"{expert}.jsonl"), "--out", local(file)),
                *("--estimand", "share", "--criterion", "kl", "--max-prompts", str(MAX_PROMPTS)),
            )
    by_alone = BUILD / "recipes" / name / "scored-alone.yml"
    write_recipe(by_alone, experts, alone)
    out = BUILD / "company" / name
    if not (out / "recipe.yml").exists():
        pairs = [f"{e}={local(PROMPTS / f'{e}.jsonl')}" for e in experts]
        command(
            *("mergekit-wp", "score", "--company", local(by_alone), "--out", local(out)),
            *(part for pair in pairs for part in ("--prompts", pair)),
            *("--max-prompts", str(MAX_PROMPTS)),
        )
    return out / "recipe.yml", by_alone


def compare(experts: Sequence[str], company: Path, alone: Path, methods: str | None) -> None:
    """One comparison on all tasks of the combination."""
    tasks = [part for e in experts for part in ("--task", local(BUILD / "tasks" / f"{e}.jsonl"))]
    command(
        *("mergekit-wp", "compare", local(company), local(alone), *tasks),
        *("--out", local(BUILD / "compare" / "-".join(experts)), "--relative"),
        *("--grid", f"{HERE}/grid.yml", "--checkers", f"{HERE}/checkers.py"),
        *("--calibration", local(BUILD / "calibration.jsonl"), "--eval-dtype", "bfloat16"),
        *(("--methods", methods) if methods else ()),
    )


@click.command()
@click.option("--methods", help="Only these methods (see mergekit-wp compare).")
@click.option("--only", help="Only this combination, e.g. instruction-math.")
def main(methods: str | None, only: str | None) -> None:
    """Make what is missing and compare."""
    if not IFEVAL.exists():
        raise click.ClickException(f"{IFEVAL} is missing; it holds IFEval's prompts")
    prepare()
    for experts in COMBINATIONS:
        if only is None or only == "-".join(experts):
            compare(experts, *score(experts), methods)


if __name__ == "__main__":
    main()
