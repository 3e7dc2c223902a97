"""Every combination of a family's experts, every method, through the public commands.

Everything is kept in the family's folder, a comparison for each combination in ``compare/NAME``,
and resumes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import click
import yaml

from benchmarks.family import Family, only_option
from benchmarks.files import REPO, command, dtype, local
from benchmarks.fit_table import FitTable, prompts_option, split_options
from benchmarks.perplexity import TEXTS
from mergekit_wp.comparison.methods import OURS, peers

GRID = REPO / "benchmarks" / "grid.yml"
#: of each behaviour, for scores
MAX_PROMPTS = 12
#: a row, named like its recipe; scores of single experts take as long as a fit
ALONE = "scored-alone"


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
            {"model": family.reference(e), "parameters": {"scores": local(file)}}
            for e, file in zip(experts, scores, strict=True)
        ],
        "dtype": "float32",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def scored_alone(family: Family, experts: Sequence[str]) -> Path:
    """The recipe that merges by the scores of each expert alone, named like its row."""
    folder = family.folder
    alone = [folder / "alone" / f"{e}.safetensors" for e in experts]
    for expert, file in zip(experts, alone, strict=True):
        if not file.exists():
            command(
                *("mergekit-wp", "score", local(family.base), family.reference(expert)),
                *("--prompts", local(family.prompts(expert)), "--out", local(file)),
                *("--estimand", "share", "--criterion", "kl", "--max-prompts", str(MAX_PROMPTS)),
            )
    recipe = folder / "recipes" / "-".join(experts) / f"{ALONE}.yml"
    write_recipe(family, recipe, experts, alone)
    return recipe


def write_grid(path: Path, methods: Collection[str]) -> Path:
    """The grids of some methods, as far as `GRID` has them."""
    grids = yaml.safe_load(GRID.read_text())
    path.write_text(yaml.safe_dump({m: own for m, own in grids.items() if m in methods}))
    return path


def compare(
    table: FitTable,
    experts: Sequence[str],
    recipes: Sequence[Path],
    methods: Sequence[str],
    max_new_tokens: int,
) -> None:
    """One comparison on all tasks of the combination; peers that learn have the fit's prompts."""
    family, name = table.family, table.name(experts)
    calibration = family.build / "calibration.jsonl"
    calibration.write_text("".join(family.prompts(e).read_text() for e in family.skills))
    grid = write_grid(family.build / "grid.yml", methods)
    given = {
        "--task": [local(family.task(e)) for e in experts],
        "--keep": [
            *(local(path) for path in TEXTS.values()),
            *(local(family.task(e)) for e in family.skills if e not in experts),
        ],
        "--prompts": [f"{e}={local(table.unlabelled(e))}" for e in experts],
    }
    command(
        *("mergekit-wp", "compare", *map(local, recipes)),
        *(part for flag, values in given.items() for value in values for part in (flag, value)),
        *("--out", local(family.folder / "compare" / name), "--relative"),
        *("--grid", local(grid), "--checkers", f"{family.here}/checkers.py"),
        *("--calibration", local(calibration), "--dtype", str(dtype()).removeprefix("torch.")),
        *("--methods", ",".join(methods), "--max-new-tokens", str(max_new_tokens)),
    )


def run(
    family: Family, methods: str | None, only: str | None, fit: str, n: int, max_new_tokens: int
) -> None:
    """Make what is missing and compare: merges by fitted gates, by scores, and the peers'.

    Raises:
        ClickException: ``only`` is no combination of the family.
    """
    combinations = family.chosen(only)
    make_missing(family)
    table = FitTable(family, split_options(fit), n=n)
    for experts in combinations:
        chosen = methods.split(",") if methods else [OURS, ALONE, *peers(len(experts))]
        recipes = [table.fitted(experts, max_new_tokens)]
        if ALONE in chosen:
            recipes.append(scored_alone(family, experts))
        compare(table, experts, recipes, [m for m in chosen if m != ALONE], max_new_tokens)


def options(main: click.decorators.FC) -> click.decorators.FC:
    """The options of a family's command."""
    for add in (
        click.option("--seed", default=0, show_default=True, help="Of the experts' training."),
        only_option,
        click.option(
            "--methods", help=f"Only these methods, A,B,... (docs/peers.md, and {ALONE})."
        ),
        click.option(
            "--fit", default="", help="Further options of `mergekit-wp fit`, as of `fitting`."
        ),
        prompts_option("As of `fitting`."),
    ):
        main = add(main)
    return main
