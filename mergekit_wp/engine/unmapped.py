"""Models whose architecture has no component map: layers and tensors, by whole forward passes.

Nothing is assumed of such a model but that it is a causal language model whose decoder layers
stand in one list. Every swap runs it from its start, and shares take the gradients of all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_wp.criteria import Criteria, Targets
from mergekit_wp.engine.block_changes import LayerWeights
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import own_values, record_whole
from mergekit_wp.engine.weight_swaps import Values
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CriterionName

if TYPE_CHECKING:
    from mergekit_wp.engine.task_vector import TaskVector, TensorContributions


def swap_weights(
    decoder: Decoder,
    batch: PromptBatch,
    swaps: Iterable[LayerWeights],
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Run the model with some of its weights exchanged: each of `swaps` is one patch.

    Args:
        decoder: the receiving model.
        batch: the prompts.
        swaps: the donor's tensors by name; one of them is held at a time.
        criteria: which criteria to read.
        targets: what they are measured against.

    Returns:
        Values ``[swaps, n]`` per criterion.
    """
    runs = [
        own_values(decoder, record_whole(decoder, batch, swap), criteria, targets) for swap in swaps
    ]
    return {c: torch.stack([run[c] for run in runs]) for c in criteria}


def whole_contributions(
    decoder: Decoder,
    batch: PromptBatch,
    vectors: Sequence[TaskVector],
    criteria: Criteria,
    targets: Targets,
) -> dict[CriterionName, list[TensorContributions]]:
    """Gradient times task vector of every tensor, for every prompt: see `share.contributions`.

    One backward pass a prompt, with the gradients of all weights in memory.
    """
    parameters = dict(decoder.model.named_parameters())
    try:
        decoder.model.requires_grad_(True)
        with torch.enable_grad():
            trace = record_whole(decoder, batch, {})
            values = own_values(decoder, trace, criteria, targets)
            results: dict[CriterionName, list[TensorContributions]] = {}
            for name, value in values.items():
                rows = [
                    torch.autograd.grad(
                        one, list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    for one in value
                ]
                results[name] = [_along(vector, list(parameters), rows) for vector in vectors]
    finally:
        decoder.model.requires_grad_(False)
    return results


@torch.no_grad()
def _along(
    vector: TaskVector, names: list[str], rows: Sequence[Sequence[torch.Tensor | None]]
) -> TensorContributions:
    found: TensorContributions = {}
    for i, name in enumerate(names):
        gradients = [row[i] for row in rows]
        if name not in vector.changed or any(g is None for g in gradients):
            continue
        delta = vector.delta_of(name)
        products = [(g * delta).sum() for g in gradients if g is not None]
        found[name] = torch.stack(products).unsqueeze(-1)
    return found
