"""First-order changes: the component's own exactly, all that is downstream of it linearly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from mergekit_wp.criteria import Criteria, fisher_at_expert
from mergekit_wp.engine.gradients import (
    PROBES,
    PROBES_AT_ONCE,
    BlockGradients,
    criterion_gradients,
    probe_gradients,
    project,
    record_with_gradients,
)
from mergekit_wp.engine.replay import Trace
from mergekit_wp.runs.recordings import Block, Result, SweepContext, receiver_position
from mergekit_wp.terms import CriterionName, Estimand, FineKind, of_knockout


def first_order_blocks(
    context: SweepContext, estimand: Estimand, kinds: list[FineKind], seed: int
) -> Iterator[Block]:
    """Exact-local, linear-downstream changes of whole kinds.

    Yields:
        Blocks whose results hold changes ``[layers, n, count]`` under ``criterion/kind``.
    """
    for b, batch in enumerate(context.references.batches):
        passes = 3 + 2 * len(context.criteria) + (2 * PROBES if of_knockout(estimand) else 0)
        yield Block(
            key=f"first-order.{estimand}.batch{b:04d}",
            cost=passes * context.weight_of(batch),
            run=lambda b=b: _first_order(context, estimand, b, kinds, seed),  # type: ignore[misc]
            b=b,
        )


def _first_order(
    context: SweepContext, estimand: Estimand, b: int, kinds: list[FineKind], seed: int
) -> Result:
    context.resident.move_to(receiver_position(estimand))
    decoder, batch = context.decoder, context.batch(b)
    trace = record_with_gradients(decoder, batch)
    dims = context.partition.dims
    found: Result = {
        f"{c}/{kind}": torch.zeros((dims.n_layers, batch.size, dims.count(kind))).double()
        for kind in kinds
        for c in context.criteria
    }
    for terms in _gradient_terms(context, estimand, b, trace, seed):
        with torch.no_grad():
            for layer in range(dims.n_layers):
                changed = [kind for kind in kinds if context.differs(estimand, kind, layer)]
                if not changed:
                    continue
                inputs = context.inputs(estimand, layer, trace, changed)
                wanted = {kind: inputs[kind] for kind in changed}
                for criterion, gradients, squared in terms:
                    for kind, change in project(gradients, wanted, layer, batch.size).items():
                        change = change.cpu().double()
                        # KL is half the probes' mean square, and v = -KL
                        term = -change.square() / (2 * PROBES) if squared else change
                        found[f"{criterion}/{kind}"][layer] += term
                del inputs, wanted  # the donor's weights of one layer at a time
    return found


def _gradient_terms(
    context: SweepContext, estimand: Estimand, b: int, trace: Trace, seed: int
) -> Iterator[list[tuple[CriterionName, BlockGradients, bool]]]:
    """Criterion, gradients and whether the projection is squared, a few at a time for memory."""
    second_order: Criteria = tuple(
        c for c in context.criteria if of_knockout(estimand) and fisher_at_expert(c)
    )
    linear: Criteria = tuple(c for c in context.criteria if c not in second_order)
    if linear:
        targets = context.targets(b)
        gradients = criterion_gradients(context.decoder, trace, linear, targets)
        yield [(c, gradient, False) for c, gradient in gradients.items()]
    if second_order:
        probes = probe_gradients(context.decoder, trace, seed)
        while some := list(islice(probes, PROBES_AT_ONCE)):
            yield [(c, probe, True) for c in second_order for probe in some]
