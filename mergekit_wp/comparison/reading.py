"""A finished comparison, read back from its folder."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from mergekit_wp.comparison.results import SCORE_FILES, Job
from mergekit_wp.comparison.rows import (
    EQUAL,
    UNTUNED,
    Comparison,
    Cost,
    ResultLine,
    Row,
    Setting,
    Trial,
)
from mergekit_wp.errors import UserError


def read_comparison(folder: Path) -> Comparison:
    """The rows of a comparison with their test scores.

    Args:
        folder: the ``--out`` of `mergekit-wp compare`.

    Raises:
        UserError: there is no finished comparison, or its files do not fit each other.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tasks = tuple(summary["tasks"])
        found: dict[Job, list[float]] = {}
        for text in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
            line = ResultLine.model_validate_json(text)
            if line.split == "test" and line.score is not None:
                job = Job.of(line.model, line.setting, line.seed, line.task, line.split)
                found.setdefault(job, []).append(line.score)
        rows = [
            Row(
                name=row["name"],
                role=row["role"],
                setting=row["setting"],
                scores={} if row["failed"] else _scores(row["name"], row["setting"], tasks, found),
                valid=row["valid"],
                failed=row["failed"],
                cost=row["cost"] and Cost.model_validate(row["cost"]),
                trials=tuple(Trial(**trial) for trial in row["trials"]),
                kept=row["kept"],
            )
            for row in summary["rows"]
        ]
        equal = {
            row["name"]: Row(
                row["name"] + EQUAL,
                row["role"],
                row["equal"]["setting"],
                _scores(row["name"], row["equal"]["setting"], tasks, found),
            )
            for row in summary["rows"]
            if row["equal"]
        }
        return Comparison(
            rows=tuple(rows),
            tasks=tasks,
            relative=summary["relative"],
            reference=summary["reference"],
            bound=summary["bound"],
            equal=equal,
            warnings=tuple(summary["warnings"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{folder} holds no finished comparison of 'mergekit-wp compare': "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def compared_scores(folder: Path) -> dict[str, str]:
    """Hashes of the score files that a comparison merged by, as they were then, by path.

    Args:
        folder: of the comparison.

    Raises:
        UserError: its comparison.json cannot be read, or does not say them.
    """
    stated = folder / "comparison.json"
    try:
        found = json.loads(stated.read_text(encoding="utf-8"))[SCORE_FILES]
        return {str(path): str(digest) for path, digest in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{stated} does not say by which score files the comparison merged "
            f"({type(error).__name__}); compare again into another folder"
        ) from error


def _scores(
    name: str, setting: Setting, tasks: tuple[str, ...], found: dict[Job, list[float]]
) -> dict[str, list[list[float]]]:
    """By task, ``[seeds][items]``."""
    model = name.removesuffix(UNTUNED)
    wanted = Job.of(model, setting, 0, "", "test").setting
    scores = {
        task: [
            values
            for job, values in sorted(found.items(), key=lambda entry: entry[0].seed)
            if (job.model, job.setting, job.task) == (model, wanted, task)
        ]
        for task in tasks
    }
    if lacking := [task for task, values in scores.items() if not values]:
        raise ValueError(f"results.jsonl has no test items of '{name}' on '{lacking[0]}'")
    return scores
