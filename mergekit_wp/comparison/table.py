"""The comparison as a table: in the terminal, in Markdown for a model card, and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_wp.comparison.resampling import Difference, Resampled
from mergekit_wp.comparison.rows import Comparison, Cost, Row
from mergekit_wp.report.words import columns, interval, markdown
from mergekit_wp.statistics import Estimate


@dataclass(frozen=True)
class Line:
    """One row with everything that is said of it; no numbers where it failed."""

    row: Row
    tasks: dict[str, Estimate]
    mean: Estimate | None
    difference: Difference | None
    equal: Estimate | None = None


def lines(resampled: Resampled) -> list[Line]:
    """Base and experts as they come, then the merges, best first, then what failed."""
    comparison = resampled.comparison
    found = []
    for row in comparison.rows:
        if row.failed is not None:
            found.append(Line(row, {}, None, None))
            continue
        merged = row.role in ("peer", "ours") and row.name != comparison.reference
        found.append(
            Line(
                row,
                {task: resampled.task(row.name, task) for task in comparison.tasks},
                resampled.mean(row.name),
                resampled.difference(row.name, comparison.reference) if merged else None,
                resampled.mean(equal.name) if (equal := comparison.equal.get(row.name)) else None,
            )
        )
    given = [line for line in found if line.row.role in ("base", "expert")]
    merges = [line for line in found if line.row.role in ("peer", "ours")]
    merges.sort(key=lambda line: -line.mean.value if line.mean else 1e9)
    return given + merges


def signed(estimate: Estimate) -> str:
    """As `interval`, with signs."""
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def setting_words(row: Row) -> str:
    """Parameters in words: ``density 0.5, lambda 1``."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.setting.items()
    )


def loss_words(row: Row, comparison: Comparison) -> str:
    """What was lost most, as a part of what the base has: ``0.12 of wiki``."""
    base = comparison.base
    losses = {} if base is None or row is base else row.losses(base)
    if not losses:
        return ""
    task = max(losses, key=lambda name: losses[name])
    return f"{losses[task]:.2f} of {task}"


def cost_words(row: Row) -> str:
    """What the merge took: ``12 settings; 64 prompts, 60 gradient steps, 41 s``; seconds of one."""
    tried = f"{row.tried} settings" if row.tried > 1 else ""
    cost = row.cost
    if cost is None:
        return tried
    counts = (
        (cost.prompts, "prompts"),
        (cost.gradient_steps, "gradient steps"),
        (cost.forward_passes, "passes"),
    )
    parts = [f"{count} {noun}" for count, noun in counts if count]
    if cost.seconds is not None:
        parts.append(f"{cost.seconds:.2g} s" if cost.seconds < 10 else f"{cost.seconds:.0f} s")
    return "; ".join(part for part in (tried, ", ".join(parts)) if part)


def what(comparison: Comparison, resampled: Resampled) -> str:
    """What the numbers are, in one sentence."""
    row = next(iter(resampled.rows.values()))
    counts = [f"{len(row.scores[task][0])} of {task}" for task in comparison.tasks]
    relative = ", each task relative to its best expert" if comparison.relative else ""
    return f"test items: {', '.join(counts)}; mean over tasks{relative}; 95% intervals"


def equal_words(line: Line) -> str:
    """A merge's mean at equal perplexity; base and experts have none."""
    if line.row.role in ("base", "expert"):
        return ""
    return none_tried([line.row]) if line.equal is None else interval(line.equal)


def none_tried(rows: Sequence[Row]) -> str:
    """That no setting of a method left plain text so good, and how good the best left it."""
    tried = [trial.perplexity for row in rows for trial in row.trials]
    known = [perplexity for perplexity in tried if perplexity is not None]
    return f"none tried (lowest {min(known):.2f})" if known else "none tried"


def what_is_equal(comparison: Comparison) -> str:
    """What the column at equal perplexity is, in one sentence."""
    assert comparison.bound is not None
    return (
        f"at equal perplexity: with the best parameters (on validation items) that leave plain "
        f"text at no more than {comparison.bound:.2f} times the base's perplexity, as "
        f"{comparison.reference} does; none: no parameters of the grid do"
    )


def ends(comparison: Comparison) -> list[str]:
    """Which methods might do better beyond their grids, in one sentence; none if none might."""
    found = [
        f"{row.name} ({', '.join(f'{key} {row.setting[key]:g}' for key in row.at_an_end)})"
        for row in comparison.rows
        if row.at_an_end
    ]
    if not found:
        return []
    return [f"chosen at an end of what was tried, better may lie beyond it: {', '.join(found)}"]


def terminal_table(resampled: Resampled) -> str:
    """Columns of at most 100 characters for three tasks of short names."""
    comparison = resampled.comparison
    rows, failed = [], []
    keeps = any(row.kept for row in comparison.rows)
    for line in lines(resampled):
        if line.mean is None:
            failed.append(f"{line.row.name} failed: {line.row.failed}")
            continue
        means = [f"{line.tasks[task].value:.2f}" for task in comparison.tasks]
        against, counts = "", ""
        if line.difference is not None:
            d = line.difference
            against, counts = signed(d.estimate), f"{d.won}/{d.lost}"
            counts += "" if d.verdict == "unclear" else f" {d.verdict}"
        lost = [loss_words(line.row, comparison)] if keeps else []
        lost += [equal_words(line)] if comparison.bound is not None else []
        rows.append([line.row.name, *means, interval(line.mean), against, counts, *lost])
    head = ["method", *comparison.tasks, "mean", "difference", "won/lost"]
    head += ["worst loss"] if keeps else []
    head += ["at equal perplexity"] if comparison.bound is not None else []
    said = f"{what(comparison, resampled)}; differences from {comparison.reference}"
    equals = [what_is_equal(comparison)] if comparison.bound is not None else []
    equals += ends(comparison)
    return "\n".join([said, *equals, *comparison.warnings, "", columns(head, rows), *failed])


def markdown_table(resampled: Resampled) -> str:
    """A table for a model card."""
    comparison = resampled.comparison
    head = ["method", *comparison.tasks, "mean", f"against {comparison.reference}", "won / lost"]
    keeps = any(row.kept for row in comparison.rows)
    equals = comparison.bound is not None
    head += ["worst loss"] if keeps else []
    head += [*(["at equal perplexity"] if equals else []), "cost"]
    rows = []
    for line in lines(resampled):
        cells = [line.row.name]
        if line.mean is None:
            cells += [f"failed: {line.row.failed}"] + [""] * (len(head) - 2)
        else:
            cells += [interval(line.tasks[task]) for task in comparison.tasks]
            cells.append(interval(line.mean))
            d = line.difference
            cells += ["", ""] if d is None else [_verdict(d), f"{d.won} / {d.lost}"]
            cells += [loss_words(line.row, comparison)] if keeps else []
            cells += [equal_words(line)] if equals else []
            cells.append(cost_words(line.row))
        rows.append(cells)
    said = f"{what(comparison, resampled)}"
    said += f"; {what_is_equal(comparison)}" if equals else ""
    said = "; ".join([said, *ends(comparison)])
    warned = "".join(f"\n{line}.\n" for line in comparison.warnings)
    return f"{markdown(head, rows, 1)}\n{said}.\n{warned}"


def summary(resampled: Resampled) -> dict[str, Any]:
    """The same numbers for programs."""
    comparison = resampled.comparison

    def numbers(estimate: Estimate) -> dict[str, float]:
        return vars(estimate).copy()

    return {
        "tasks": list(comparison.tasks),
        "relative": comparison.relative,
        "reference": comparison.reference,
        "bound": comparison.bound,
        "warnings": list(comparison.warnings),
        "rows": [
            {
                "name": line.row.name,
                "role": line.row.role,
                "setting": line.row.setting,
                "valid": line.row.valid,
                "trials": [vars(trial) for trial in line.row.trials],
                "kept": line.row.kept,
                "equal": line.equal
                and {**numbers(line.equal), "setting": comparison.equal[line.row.name].setting},
                "cost": line.row.cost and line.row.cost.model_dump(),
                "failed": line.row.failed,
                "tasks": {task: numbers(found) for task, found in line.tasks.items()},
                "mean": line.mean and numbers(line.mean),
                "difference": line.difference
                and {
                    **numbers(line.difference.estimate),
                    "won": line.difference.won,
                    "lost": line.difference.lost,
                    "verdict": line.difference.verdict,
                },
            }
            for line in lines(resampled)
        ],
    }


def records(resampled: Resampled) -> list[dict[str, Any]]:
    """The same again, flat: one record a row, its tasks and intervals in columns of their own."""
    found = []
    for row in summary(resampled)["rows"]:
        record = {key: row[key] for key in ("name", "role", "setting", "valid", "failed")}
        for task in resampled.comparison.tasks:
            record[task] = row["tasks"][task]["value"] if task in row["tasks"] else None
        cost = row["cost"] or dict.fromkeys(Cost.model_fields)
        record |= {"tried": len(row["trials"]), **cost, **row["kept"]}
        for key in ("mean", "difference", "equal"):
            estimate = row[key] or {"value": None, "low": None, "high": None}
            record |= {key: estimate["value"]}
            record |= {f"{key}_{end}": estimate[end] for end in ("low", "high")}
        for key in ("won", "lost", "verdict"):
            record[key] = row["difference"] and row["difference"][key]
        found.append(record)
    return found


def _verdict(difference: Difference) -> str:
    text = signed(difference.estimate)
    return text if difference.verdict == "unclear" else f"{text} {difference.verdict}"
