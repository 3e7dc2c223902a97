"""How many components each expert gave a merge, from the gates alone: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_wp.components import TensorLayout
from mergekit_wp.merging.host import is_tied
from mergekit_wp.merging.plan import planned_gates, planned_source
from mergekit_wp.terms import FINE_KINDS, CriterionName, Estimand, FineKind


@dataclass(frozen=True)
class Tally:
    """The components of one kind.

    Attributes:
        total: components of the kind that the merge writes.
        taking: for each expert, components that take something of it: its gate is positive, and
            it changed them.
        leading: for each expert, components in which its gate is the largest; where several are
            equal, a part of one.
        gates: for each expert, the mean gate over all components of the kind.
    """

    total: int
    taking: tuple[int, ...]
    leading: tuple[float, ...]
    gates: tuple[float, ...]


@dataclass(frozen=True)
class Contributions:
    """Tallies by kind, for experts in the recipe's order."""

    experts: tuple[str, ...]
    kinds: dict[FineKind, Tally]


def contributions(
    order: Sequence[ModelReference], tasks: Sequence[ExecuteMergeMethodTask]
) -> Contributions:
    """Tally a planned weight_patching merge.

    A component that is spread over several tensors or gates counts with its mean gate. A tensor
    that an expert did not change counts as a gate of zero.

    Args:
        order: the experts.
        tasks: mergekit's plan, one task for every written tensor.

    Raises:
        UserError: score files that do not fit the recipe.
    """
    sums: dict[tuple[FineKind, int | str | None], tuple[torch.Tensor, int]] = {}
    for task in tasks:
        for key, found in _gates(task, order):
            total, count = sums.get(key, (torch.zeros_like(found), 0))
            sums[key] = (total + found, count + 1)
    return Contributions(
        tuple(str(expert) for expert in order),
        {
            kind: _tally([total / n for (k, _), (total, n) in sums.items() if k == kind])
            for kind in FINE_KINDS
            if any(k == kind for k, _ in sums)
        },
    )


def used_scores(
    tasks: Sequence[ExecuteMergeMethodTask],
) -> list[tuple[Estimand, CriterionName]]:
    """The scores that a planned merge takes: (estimand, criterion)."""
    found: dict[tuple[Estimand, CriterionName], None] = {}
    for task in tasks:
        given = task.parameters
        estimand: Estimand = "path" if given["fusion"] == "path" else given["estimand"]
        found[estimand, given["criterion"]] = None
    return list(found)


def _gates(
    task: ExecuteMergeMethodTask, order: Sequence[ModelReference]
) -> list[tuple[tuple[FineKind, int | str | None], torch.Tensor]]:
    """Which components a tensor belongs to, and their gates: ``[experts, components]``."""
    name, tied = task.output_weight.name, is_tied(task.base_model)
    gated = planned_gates(task, by_component=True)
    if gated is None:
        return [(("tensor", name), torch.zeros(len(order), 1, dtype=torch.float64))]
    gates = torch.zeros(len(order), gated.gates.shape[1], dtype=torch.float64)
    for expert, row in zip(gated.experts, gated.gates, strict=True):
        file = planned_source(task, expert)
        if file.norm(file.scored_name(name, tied)) > 0:
            gates[order.index(expert)] = row
    layout = gated.layout
    assert isinstance(layout, TensorLayout)
    parts = gates.split([count for _, count in layout.owners], 1)
    where = name if layout.whole else layout.layer
    return [((kind, where), part) for kind, part in zip(layout.kinds, parts, strict=True)]


def _tally(parts: Sequence[torch.Tensor]) -> Tally:
    gates = torch.cat(list(parts), dim=1)
    positive = gates > 0
    leading = (positive & (gates == gates.amax(0))).double()
    leading /= leading.sum(0).clamp(min=1)
    return Tally(
        total=gates.shape[1],
        taking=tuple(positive.sum(1).tolist()),
        leading=tuple(leading.sum(1).tolist()),
        gates=tuple(gates.mean(1).tolist()),
    )
