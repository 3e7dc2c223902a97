"""Every combination of a family's experts, every method, through the public commands.

Everything is kept in the family's folder, a comparison for each combination in ``compare/NAME``,
and resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import yaml

from benchmarks.family import Family
from benchmarks.files import command, local
from benchmarks.fit_table import FitTable

#: of each behaviour, for scores
MAX_PROMPTS = 12


def make_missing(family: Family) -> None:
    """Base, data, experts."""
    module = f"benchmarks.{family.name}"
    if not family.base.exists():
        command("python", "-m", f"{module}.fetch")
    if not all(family.task(name).exists() for name in family.skills):
        command("python", "-m", f"{module}.tasks")
    missing = [name for name in family.skills if not family.expert(name).exists()]
    if missing:
        only = [part for name in missing for part in ("--only", name)]
        command("python", "-m", f"{module}.experts", *only, "--seed", str(family.seed))


def write_recipe(
    family: Family, path: Path, experts: Sequence[str], scores: Sequence[Path]
) -> None:
    """A weight-patching recipe of default parameters."""
    data = {
        "merge_method": "weight_patching",
        "base_model": local(family.base),
        "models": [
            {"model": local(family.expert(e)), "parameters": {"scores": local(file)}}
            for e, file in zip(experts, scores, strict=True)
        ],
        "dtype": "float32",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def score(family: Family, experts: Sequence[str]) -> tuple[Path, Path]:
    """Scores in company, and alone; the recipes that merge by them."""
    name, folder = "-".join(experts), family.folder
    alone = [folder / "alone" / f"{e}.safetensors" for e in experts]
    for expert, file in zip(experts, alone, strict=True):
        if not file.exists():
            command(
                *("mergekit-wp", "score", local(family.base), local(family.expert(expert))),
                *("--prompts", local(family.prompts(expert)), "--out", local(file)),
                *("--estimand", "share", "--criterion", "kl", "--max-prompts", str(MAX_PROMPTS)),
            )
    by_alone = folder / "recipes" / name / "scored-alone.yml"
    write_recipe(family, by_alone, experts, alone)
    out = folder / "company" / name
    if not (out / "recipe.yml").exists():
        pairs = [f"{e}={local(family.prompts(e))}" for e in experts]
        command(
            *("mergekit-wp", "score", "--company", local(by_alone), "--out", local(out)),
            *(part for pair in pairs for part in ("--prompts", pair)),
            *("--max-prompts", str(MAX_PROMPTS)),
        )
    return out / "recipe.yml", by_alone


def learnt_from(family: Family, experts: Sequence[str]) -> list[str]:
    """The prompts of peers that learn: those of the fit."""
    return [f"{e}={local(FitTable(family).unlabelled(e))}" for e in experts]


def compare(
    family: Family, experts: Sequence[str], recipes: Sequence[Path], methods: str | None
) -> None:
    """One comparison on all tasks of the combination."""
    tasks = [part for e in experts for part in ("--task", local(family.task(e)))]
    calibration = family.build / "calibration.jsonl"
    calibration.write_text("".join(family.prompts(name).read_text() for name in family.skills))
    command(
        *("mergekit-wp", "compare", *map(local, recipes), *tasks),
        *("--out", local(family.folder / "compare" / "-".join(experts)), "--relative"),
        *("--grid", "benchmarks/grid.yml", "--checkers", f"{family.here}/checkers.py"),
        *("--calibration", local(calibration), "--dtype", "bfloat16"),
        *(part for pair in learnt_from(family, experts) for part in ("--prompts", pair)),
        *(("--methods", methods) if methods else ()),
    )


def fitted(family: Family, name: str) -> list[Path]:
    """The recipe of a combination's fit under the name of its row, where it was fitted."""
    made = family.folder / "fitting" / name / "recipe.yml"
    if not made.exists():
        return []
    path = family.folder / "recipes" / name / "fitted.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.read_text())
    return [path]


def run(family: Family, methods: str | None, only: str | None) -> None:
    """Make what is missing and compare; also by fitted gates, where they were fitted."""
    make_missing(family)
    for experts in family.combinations:
        name = "-".join(experts)
        if only in (None, name):
            recipes = [*score(family, experts), *fitted(family, name)]
            compare(family, experts, recipes, methods)


def options(main: click.decorators.FC) -> click.decorators.FC:
    """The options of a family's command."""
    for add in (
        click.option("--seed", default=0, show_default=True, help="Of the experts' training."),
        click.option("--only", metavar="COMBINATION", help="Only this one, such as A-B."),
        click.option("--methods", help="Only these methods (see mergekit-wp compare)."),
    ):
        main = add(main)
    return main
