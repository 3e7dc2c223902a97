"""From results by item to the best setting of a method, and to the rows of the table. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergekit_wp.comparison.rows import Setting, Trial
from mergekit_wp.errors import UserError, option

#: by task: scores of the items
ByTask = Mapping[str, Sequence[float]]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def ceilings(experts: Sequence[ByTask], tasks: Sequence[str], split: str) -> dict[str, float]:
    """Each task's mean for the expert that is best at it.

    Raises:
        UserError: no expert gets anything right.
    """
    if not experts:
        raise UserError("every expert failed, so nothing can be relative to one")
    found = {task: max(mean(expert[task]) for expert in experts) for task in tasks}
    for task, value in found.items():
        if value <= 0:
            raise UserError(
                f"task '{task}': no expert gets any {split} item right, so nothing can be relative "
                f"to it; leave {option('relative')} out, or give items that an expert solves"
            )
    return found


def objective(scores: ByTask, ceiling: Mapping[str, float] | None) -> float:
    """Mean over tasks of the item means, each divided by its ceiling where there is one."""
    return mean([mean(values) / (ceiling[t] if ceiling else 1) for t, values in scores.items()])


def best(trials: Sequence[Trial]) -> Trial:
    """The setting with the highest objective, the first of equals."""
    return max(trials, key=lambda trial: trial.value)


def within(trials: Sequence[Trial], bound: float) -> list[Trial]:
    """Settings that leave plain text at a perplexity of at most so many times the base's."""
    return [t for t in trials if t.perplexity is not None and t.perplexity <= bound]


def coordinate_search(
    start: Setting,
    values: Sequence[float],
    objective_of: Callable[[Setting], float | None],
    rounds: int = 2,
) -> None:
    """Change one parameter after the other to the value that does best, the others held.

    Args:
        start: parameters to begin from.
        values: of each.
        objective_of: measures a setting and keeps what it found; None where it failed.
        rounds: through all parameters; it ends where one changes nothing.
    """
    here, reached = start, objective_of(start)
    for _ in range(rounds):
        before = here
        for key in start:
            for value in values:
                there = here | {key: value}
                found = objective_of(there)
                if found is not None and (reached is None or found > reached):
                    here, reached = there, found
        if here == before:
            return
