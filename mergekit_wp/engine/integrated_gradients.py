"""Shares: integrated gradients of the criterion along the straight path from base to expert.

    share_c = integral over a in [0, 1] of grad r(B + a Delta) . Delta_c

No weight gradient is ever formed. Every module of the family is linear in its weights, so for a
module y = f(x; W) with output gradient g, grad_W . Delta = g . f(x; Delta); kept per output row
(sum of g * x Delta^T) or per input column (sum of x * g Delta), it also stays apart per prompt,
which gives standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mergekit_wp.components import Partition, TensorLayout
from mergekit_wp.criteria import Criteria, Targets
from mergekit_wp.engine.decoder import Decoder, first, hooked
from mergekit_wp.engine.gradients import record_with_gradients
from mergekit_wp.engine.products import Factors
from mergekit_wp.engine.replay import Receiver, record_whole
from mergekit_wp.engine.writers import contribution, is_mixture
from mergekit_wp.models.pair import Pair
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CriterionName

#: contributions ``[n, components of the tensor]`` by tensor name
TensorContributions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TaskVector:
    """Δ = expert − base, streamed; tensors that are not ``changed`` are zero and never read.

    Attributes:
        delta_of: reads one tensor.
        changed: tensors that are not zero.
        factors_of: the factors of one matrix where it has them, which stay in memory.
    """

    delta_of: Callable[[str], torch.Tensor]
    changed: frozenset[str]
    factors_of: Callable[[str], Factors | None] = lambda _name: None

    @classmethod
    def of(cls, pair: Pair, dtype: torch.dtype, device: str) -> TaskVector:
        """That of a pair, in a dtype on a device."""

        @cache
        def factors_of(name: str) -> Factors | None:
            found = pair.factors(name)
            if found is None:
                return None
            left, right, scale = found
            # in a wide dtype already: the scale is no power of two
            return Factors((left.to(device, dtype) * scale), right.to(device, dtype))

        return cls(lambda name: pair.delta(name, dtype, device), pair.changed, factors_of)


def _sum_per_prompt(values: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """Sum everything but prompts and the last dimension: to ``[n, last]``."""
    if values.shape[0] == batch.size and values.dim() > 2:
        return values.flatten(1, -2).sum(1)
    if values.shape[0] == batch.ids.numel() and values.dim() == 2:
        # a mixture's router and experts run on all positions of all prompts in a row
        by_prompt: torch.Tensor = values.unflatten(0, tuple(batch.ids.shape))
        return by_prompt.sum(1)
    # the final norm and the unembedding run on response positions only: [P, last]
    flat = values.reshape(-1, values.shape[-1])
    # a product, as in `criteria.per_prompt_mean`
    return torch.nn.functional.one_hot(batch.rows, batch.size).to(flat.dtype).T @ flat


def module_contribution(
    module: nn.Module,
    parameter: str,
    delta: torch.Tensor,
    layout: TensorLayout,
    inputs: tuple[torch.Tensor, ...],
    g: torch.Tensor,
    batch: PromptBatch,
) -> torch.Tensor:
    """grad_W . Delta of one parameter, ``[n, count]`` per prompt and component.

    Args:
        module: a Linear, Conv1D, Embedding, norm, router, or the stacked experts of a mixture.
        parameter: its name within the module.
        delta: the task vector at this parameter.
        layout: how the tensor is shared out.
        inputs: what the module was called with.
        g: gradient of the summed values with respect to its (first) output.
        batch: the prompts.
    """
    x = inputs[0]
    if is_mixture(module):
        by_neuron = contribution(module, parameter, delta, inputs, g)  # type: ignore[arg-type]
        return _sum_per_prompt(by_neuron, batch)
    by_row = delta.T if isinstance(module, Conv1D) and delta.dim() == 2 else delta
    if layout.dims == ((0,) if by_row is not delta else (1,)):
        return layout.reduce(_sum_per_prompt(x * (g @ by_row), batch))
    if parameter == "bias":
        product = g * delta
    else:
        others = {
            n: torch.zeros_like(p, device=delta.device)  # an offloaded one is nowhere
            for n, p in module.named_parameters()
            if n != parameter
        }
        change = first(functional_call(module, {parameter: delta, **others}, (x,)))
        if x.is_floating_point() and delta.dim() == 1:  # norms may scale by 1 + weight
            nothing = {parameter: torch.zeros_like(delta), **others}
            change = change - first(functional_call(module, nothing, (x,)))
        product = g * change
    return layout.reduce(_sum_per_prompt(product, batch))


def contributions(
    decoder: Decoder,
    batch: PromptBatch,
    partition: Partition,
    vectors: Sequence[TaskVector],
    criteria: Criteria,
    targets: Targets,
) -> dict[CriterionName, list[TensorContributions]]:
    """Grad v_i . Delta_c at the decoder's present weights, for every prompt and component.

    Args:
        decoder: the model, somewhere between base and expert (or merge).
        batch: the prompts.
        partition: the layouts of all tensors.
        vectors: the task vectors; one backward pass serves all of them.
        criteria: which criteria.
        targets: what they are measured against.

    Returns:
        Per criterion, contributions to each task vector; a tensor no value depends on is absent.
    """
    if not decoder.architecture.mapped:
        return _whole_contributions(decoder, batch, vectors, criteria, targets)
    collecting: list[TensorContributions] = [{} for _ in vectors]

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs = tuple(x.detach() for x in args)
            made = first(output)

            def backward(g: torch.Tensor) -> None:
                for parameter, _ in module.named_parameters(recurse=False):
                    name = names[f"{path}.{parameter}"]
                    for vector, found in zip(vectors, collecting, strict=True):
                        if name not in vector.changed:
                            continue
                        with torch.no_grad():
                            part = module_contribution(
                                module,
                                parameter,
                                vector.delta_of(name),
                                layouts[name],
                                inputs,
                                g,
                                batch,
                            )
                        found[name] = found[name] + part if name in found else part

            if made.requires_grad:
                made.register_hook(backward)

        return after

    layouts = partition.layouts
    names = {
        name: name
        if name in layouts
        else f"{decoder.architecture.embedding}.weight"  # a tied unembedding
        for name, _ in decoder.model.named_parameters(remove_duplicate=False)
    }
    handles = [
        module.register_forward_hook(hook(path))
        for path, module in decoder.model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    results: dict[CriterionName, list[TensorContributions]] = {}
    with torch.enable_grad(), hooked(handles):
        recording = record_with_gradients(decoder, batch)
        values = Receiver(decoder, recording, criteria, targets).own
        for left, (name, value) in zip(range(len(values))[::-1], values.items(), strict=True):
            value.sum().backward(retain_graph=left > 0)  # the last one frees what it has passed
            results[name] = [dict(found) for found in collecting]
            for found in collecting:
                found.clear()
    return results


def _whole_contributions(
    decoder: Decoder,
    batch: PromptBatch,
    vectors: Sequence[TaskVector],
    criteria: Criteria,
    targets: Targets,
) -> dict[CriterionName, list[TensorContributions]]:
    """The same where there is no map: nothing is known of the model but its layers.

    One backward pass a prompt, with the gradients of all weights in memory.
    """
    parameters = dict(decoder.model.named_parameters())
    try:
        decoder.model.requires_grad_(True)
        with torch.enable_grad():
            recording = record_whole(decoder, batch, {})
            values = Receiver(decoder, recording, criteria, targets).own
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
