"""The engine's way: the blocks that `mergekit-wp score` runs, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from benchmarks.components import Component
from benchmarks.engine.inputs import Inputs
from benchmarks.engine.naive import Scores
from mergekit_wp.criteria import Criteria
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.scoring.blocks import Block, exact_blocks, first_order_blocks, share_blocks
from mergekit_wp.scoring.measure import measure
from mergekit_wp.terms import SLICED_KINDS, Estimand, FineKind, Kind


def exact(
    inputs: Inputs,
    components: Sequence[Component],
    criteria: Criteria,
    estimand: Estimand = "gain",
) -> Scores:
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
    recordings = inputs.recordings(criteria)
    for block, result in _computed(
        inputs, recordings, exact_blocks(recordings, estimand, selected)
    ):
        for kind, indices in block.chosen:
            where = [place[kind, block.layer, i] for i in indices]
            for criterion in criteria:
                totals[criterion][where] += result[f"{criterion}/{kind}"].double().sum(-1).cpu()
    n = sum(batch.size for batch in inputs.references.batches)
    distances = {c: inputs.references.values[c].distance.double().mean() for c in criteria}
    return {c: total / n / distances[c] for c, total in totals.items()}


def first_order(
    inputs: Inputs,
    criteria: Criteria,
    estimand: Estimand = "gain",
    kinds: Sequence[FineKind] = SLICED_KINDS,
) -> dict[str, torch.Tensor]:
    """First-order gains of all components of some kinds: ``[layers, count]`` by criterion/kind."""
    recordings = inputs.recordings(criteria)
    blocks = first_order_blocks(recordings, estimand, kinds, 0, curvature=False)
    totals: dict[str, torch.Tensor] = {}
    for _, result in _computed(inputs, recordings, blocks):
        for name, value in result.items():
            totals[name] = totals.get(name, 0) + value.sum(1)
    n = sum(batch.size for batch in inputs.references.batches)
    distances = {c: inputs.references.values[c].distance.double().mean() for c in criteria}
    return {name: t / n / distances[name.partition("/")[0]] for name, t in totals.items()}


def share_step(inputs: Inputs, criteria: Criteria) -> None:
    """One step of the share integral: every component of the fine partition, norms and all."""
    recordings = inputs.recordings(criteria)
    for _ in _computed(inputs, recordings, share_blocks(recordings, 1)):
        pass


def _computed(
    inputs: Inputs, recordings: Recordings, blocks: Iterable[Block]
) -> Iterator[tuple[Block, dict[str, torch.Tensor]]]:
    at_once = AtOnce(inputs.batch_size, print, recordings.forget)
    for block in blocks:
        yield block, measure(block, recordings, at_once)
