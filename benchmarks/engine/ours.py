"""The engine's way: the blocks that `mergekit-wp score` runs, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.engine.inputs import Inputs
from benchmarks.engine.naive import Scores
from mergekit_wp.components import Component
from mergekit_wp.criteria import Criteria
from mergekit_wp.scoring.exact import exact_blocks
from mergekit_wp.scoring.first_order import first_order_blocks
from mergekit_wp.scoring.shares import share_blocks
from mergekit_wp.terms import SLICED_KINDS, Kind


def exact(inputs: Inputs, components: Sequence[Component], criteria: Criteria) -> Scores:
    """Gains of heads and neurons by the engine's exact sweep, in the order given."""
    n_layers = inputs.partition.dims.n_layers
    kinds = list(dict.fromkeys(component.kind for component in components))
    selected: dict[Kind, list[list[int]]] = {
        kind: [
            [c.index for c in components if c.kind == kind and c.layer == layer]
            for layer in range(n_layers)
        ]
        for kind in kinds
    }
    place = {(c.kind, c.layer, c.index): i for i, c in enumerate(components)}
    totals = {name: torch.zeros(len(components), dtype=torch.float64) for name in criteria}
    for block in exact_blocks(inputs.context(criteria), "gain", selected, "bench"):
        layer = int(block.key.split(".layer")[-1])
        for key, change in block.run().items():
            criterion, kind = key.split("/")
            where = [place[kind, layer, i] for i in selected[kind][layer]]
            totals[criterion][where] += change.double().sum(-1).cpu()
    n = sum(batch.size for batch in inputs.references.batches)
    distances = {c: inputs.references.values[c].distance.double().mean() for c in criteria}
    return {c: total / n / distances[c] for c, total in totals.items()}


def first_order(inputs: Inputs, criteria: Criteria) -> None:
    """First-order gains of all heads, K/V groups and neurons."""
    for block in first_order_blocks(inputs.context(criteria), "gain", list(SLICED_KINDS), 0):
        block.run()


def share_step(inputs: Inputs, criteria: Criteria) -> None:
    """One step of the share integral: every component of the fine partition, norms and all."""
    for block in share_blocks(inputs.context(criteria), 1):
        block.run()
