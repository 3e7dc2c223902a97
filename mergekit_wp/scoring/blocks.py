"""What the sweeps are made of: blocks, the smallest pieces that are kept when a run is killed.

A block is data: whoever has the recordings can compute it, in this process or in a worker of a
cluster (`measure`), and its name in the journal follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_wp.criteria import Criteria, log_probability, maximal_at_expert
from mergekit_wp.engine.gradients import CORRECTING_PROBES, PROBES
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.terms import CriterionName, Estimand, FineKind, Kind, SweepName, of_knockout

#: components of a layer to swap, by kind; all of the kind where none are named
Chosen = tuple[tuple[Kind, tuple[int, ...]], ...]
#: components to swap: by kind, by layer, their indices; of whole layers the index is 0. Tensors
#: outside the layers stand under kind ``tensor`` in an extra, last list, as positions in
#: `Partition.tensor_names`; so do those inside
Selected = Mapping[Kind, list[list[int]]]


@dataclass(frozen=True)
class Block:
    """One layer's patches on one batch, one first-order pass, or one step of the share integral.

    Attributes:
        sweep: what it is part of.
        estimand: what is measured.
        batch: number of the batch of prompts.
        layer: that is patched, the number of layers for what lies outside them; None where the
            block is of all layers.
        chosen: components.
        step: of the share integral, and how many it has.
        curved: criteria that the second order is estimated of.
        probes: random ones it is estimated with.
        seed: of these.
    """

    sweep: SweepName
    estimand: Estimand
    batch: int
    layer: int | None = None
    chosen: Chosen = ()
    step: tuple[int, int] | None = None
    curved: Criteria = ()
    probes: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in the journal."""
        parts = list(dict.fromkeys((str(self.sweep), str(self.estimand))))
        parts += [] if self.step is None else [f"step{self.step[0]:04d}"]
        parts.append(f"batch{self.batch:04d}")
        parts += [] if self.layer is None else [f"layer{self.layer:04d}"]
        return ".".join(parts)

    @property
    def prompts(self) -> int:
        """The dimension of its results that counts prompts."""
        return 0 if self.step is not None else 1

    def cost(self, recordings: Recordings, at_once: int) -> float:
        """In forward passes over all prompts.

        Args:
            recordings: of the sweep.
            at_once: sequences that go through the model together.
        """
        batch, criteria = recordings.references.batches[self.batch], len(recordings.criteria)
        share = batch.size / recordings.n_prompts
        if self.step is not None:
            return (2 + 2 * criteria) * share
        if self.layer is None:
            return (3 + 2 * criteria + 2 * self.probes) * share
        inside = self.layer < recordings.partition.dims.n_layers
        depth = recordings.depth(self.layer) if inside else 1.0
        swaps = sum(len(indices) for _, indices in self.chosen)
        return (swaps or recordings.copies(batch, at_once)) * depth * share


def share_blocks(recordings: Recordings, steps: int) -> Iterator[Block]:
    """The share integral, one step on one batch at a time."""
    for step in range(steps):
        for batch in range(len(recordings.references.batches)):
            yield Block("share", "share", batch, step=(step, steps))


def flat(estimand: Estimand, criterion: CriterionName) -> bool:
    """Whether the gradient vanishes at the receiver: the second order is all there is."""
    return of_knockout(estimand) and maximal_at_expert(criterion)


def second_order(criteria: Criteria, estimand: Estimand, curvature: bool) -> tuple[Criteria, int]:
    """Criteria of which the second order is estimated, and by how many random probes."""
    curved: Criteria = tuple(
        c for c in criteria if flat(estimand, c) or (curvature and log_probability(c))
    )
    alone = any(flat(estimand, c) for c in curved)
    return curved, (PROBES if alone else CORRECTING_PROBES) if curved else 0


def first_order_blocks(
    recordings: Recordings,
    estimand: Estimand,
    kinds: Sequence[FineKind],
    seed: int,
    curvature: bool,
) -> Iterator[Block]:
    """Exact-local changes of whole kinds, and what is made of them downstream to first order.

    Args:
        recordings: of the sweep.
        estimand: what is measured.
        kinds: of component.
        seed: of random probes.
        curvature: to second order where the criterion is a log-probability; else only where the
            first order vanishes.
    """
    chosen: Chosen = tuple((kind, ()) for kind in kinds)
    curved, probes = second_order(recordings.criteria, estimand, curvature)
    for batch in range(len(recordings.references.batches)):
        yield Block(
            "first-order", estimand, batch, chosen=chosen, curved=curved, probes=probes, seed=seed
        )


def exact_blocks(
    recordings: Recordings,
    estimand: Estimand,
    selected: Selected,
    sweep: Literal["exact", "verify"] = "exact",
) -> Iterator[Block]:
    """Exact patches of chosen components, by a gain or a knockout, of weights or activations."""
    n_layers = recordings.partition.dims.n_layers
    for batch in range(len(recordings.references.batches)):
        for layer in range(n_layers + 1):
            lists = {kind: of[layer] for kind, of in selected.items() if layer < len(of)}
            chosen = tuple((kind, tuple(indices)) for kind, indices in lists.items() if indices)
            # above the last layer that matters nothing changes
            if chosen and (layer == n_layers or recordings.depth(layer)):
                yield Block(sweep, estimand, batch, layer, chosen)


def noise_blocks(recordings: Recordings, estimand: Estimand) -> Iterator[Block]:
    """Heads swapped for themselves in the first and middle layer: what rounding alone scores."""
    for layer in sorted({0, recordings.partition.dims.n_layers // 2}):
        yield Block("noise", estimand, 0, layer)
