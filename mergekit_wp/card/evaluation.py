"""Results of `mergekit-wp compare` in the form of the Hub's ``model-index``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult
from mergekit.config import MergeConfiguration

from mergekit_wp.comparison.reading import compared_scores, read_comparison
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import recipe_name
from mergekit_wp.comparison.table import markdown_table
from mergekit_wp.errors import UserError, option
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import with_scores

_BY = "(mergekit-wp compare)"


@dataclass(frozen=True)
class Evaluation:
    """One row of a comparison: the merge's own results, and the whole table in Markdown."""

    row: str
    results: list[EvalResult]
    table: str


def evaluation(
    folder: Path, row: str | None, config: MergeConfiguration, digest: Callable[[str], str]
) -> Evaluation:
    """The test results of the row that a merge is.

    Args:
        folder: what `mergekit-wp compare` wrote.
        row: the row's name; None looks for the row whose recipe is the merge's.
        config: the merge's recipe.
        digest: a score file's path to the hash of its content, as paths may differ.

    Raises:
        UserError: no comparison there, no such row, or none with this recipe.
    """
    comparison = read_comparison(folder)
    rows = {r.name: r for r in comparison.rows if r.role in ("ours", "peer")}
    if row is None:
        row = _same_recipe(folder, list(rows), config, digest)
    if row not in rows:
        raise UserError(f"{folder} has no merge '{row}'; it has {', '.join(rows)}")
    if rows[row].failed is not None:
        raise UserError(f"{folder}: '{row}' failed there ({rows[row].failed})")
    results = [_result(task, scores) for task, scores in rows[row].scores.items()]
    return Evaluation(row, results, markdown_table(Resampled(comparison)))


def _same_recipe(
    folder: Path, rows: list[str], config: MergeConfiguration, digest: Callable[[str], str]
) -> str:
    wanted, compared = _canonical(config, digest), compared_scores(folder)
    for row in rows:
        path = folder / "recipes" / (recipe_name(row) + ".yml")
        # what AIM made of a merge has that merge's recipe, and is another model
        if row.endswith("+aim") or not path.exists():
            continue
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            # score files as they were then: what lies there now may be of another fit
            theirs = _canonical(MergeConfiguration.model_validate(data), compared.__getitem__)
        except (OSError, ValueError, KeyError, yaml.YAMLError):
            continue  # changed since, so that nobody knows what it was
        if theirs == wanted:
            return row
    raise UserError(
        f"none of the recipes in {folder / 'recipes'} is that of this merge, by the score files "
        "that it has; compare this one, or if one of its rows is this model nevertheless, say "
        f"{option('row', 'NAME')}, one of {', '.join(rows)}"
    )


def _canonical(config: MergeConfiguration, digest: Callable[[str], str]) -> Any:
    """A recipe as far as it decides the merge; score files by their content."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {k: filled(v) for k, v in value.items()}
            return {k: v for k, v in inner.items() if v not in ({}, None)}
        return [filled(entry) for entry in value] if isinstance(value, list) else value

    return filled(with_scores(data_of(config, exclude_none=True), digest))


def is_ours(result: EvalResult) -> bool:
    """Whether a result of a card came from a comparison."""
    return str(result.metric_name).endswith(_BY)


def _result(task: str, scores: list[list[float]]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^a-z0-9_.-]+", "-", task.lower()),
        dataset_name=task,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"mean score of {len(scores[0])} test items {_BY}",
        metric_value=round(float(np.mean(scores)), 4),
        verified=False,
    )
