"""Derivatives by every gate, summed over prompts: what fitting climbs.

    d v / d g_ec = grad_W v . Delta_ec        at W = B + sum over e, c of g_ec Delta_ec

where Delta_ec is the part of expert e's difference that gate c covers.

Unlike shares, a fit needs no value per prompt. So weight gradients are formed after all, but of one
layer at a time: one product over the tokens serves every expert, where keeping prompts apart
takes one for each; and a layer's differences are read once for all behaviours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mergekit_wp.components import GateLayout
from mergekit_wp.criteria import Targets, kl_values, reproduced
from mergekit_wp.engine.decoder import Decoder, first
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.replay import Recording, record
from mergekit_wp.prompts import PromptBatch

#: derivatives ``[gates of the tensor]`` by tensor name, float64 on the CPU
Slopes = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Term:
    """One behaviour's part of the objective: ``weight`` times the sum of its values of ``kl``."""

    batch: PromptBatch
    targets: Targets
    weight: float


def slopes(
    decoder: Decoder,
    terms: Sequence[Term],
    layouts: Mapping[str, GateLayout],
    vectors: Sequence[TaskVector],
) -> tuple[list[torch.Tensor], list[Slopes]]:
    """Values of every term at the decoder's present weights, and the slope of their sum.

    The model runs forward twice and back once, for terms without weight forward once; between
    layers only what enters each is kept.

    Args:
        decoder: the merge as it stands.
        terms: of the objective.
        layouts: how the gates of all tensors lie.
        vectors: the experts' task vectors.

    Returns:
        By term, values of ``kl`` and whether the response is reproduced whole, ``[2, n]``; and for
        each task vector the slope by every gate; a tensor no value depends on is absent.
    """
    backward = _Backward(decoder, layouts, vectors)
    with torch.no_grad():
        recordings = [record(decoder, term.batch) for term in terms]
    values = []
    last = len(decoder.layers) - 1
    #: what counts, with the gradient of what left its last layer
    flowing: list[tuple[Term, Recording, torch.Tensor]] = []
    with backward.through(decoder.norm, decoder.head) as stage:
        for term, recording in zip(terms, recordings, strict=True):
            hidden = recording.residual(last).detach().requires_grad_()
            batch, targets = term.batch, term.targets
            logits = decoder.logits(hidden[batch.rows, batch.cols])
            found = kl_values(logits, batch, targets)
            if term.weight:
                weight = torch.full_like(found, term.weight)
                flowing.append((term, recording, stage.back(found, hidden, weight)))
            same = reproduced(logits.detach(), batch, targets)
            values.append(torch.stack([found.detach().double(), same]))
    for index in range(last, -1, -1):
        with backward.through(decoder.layers[index]) as stage:
            flowing = [
                (term, recording, stage.back(*_again(decoder, recording, index), gradient))
                for term, recording, gradient in flowing
            ]
    if backward.moves(*decoder.entrances):
        with backward.through(*decoder.entrances) as stage:
            for term, _, gradient in flowing:
                stage.back(decoder.entering(term.batch), None, gradient)
    return values, backward.found


def _again(decoder: Decoder, recording: Recording, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output and input, with what lies between them."""
    call = recording.calls[index]
    entering = call.hidden.detach().requires_grad_()
    return first(decoder.layers[index](entering, **call.kwargs)), entering


class _Backward:
    """Collects slopes from one stage of modules after the other."""

    def __init__(
        self, decoder: Decoder, layouts: Mapping[str, GateLayout], vectors: Sequence[TaskVector]
    ) -> None:
        self.layouts, self.vectors = layouts, vectors
        self.found: list[Slopes] = [{} for _ in vectors]
        changed = frozenset[str]().union(*(vector.changed for vector in vectors))
        #: tensors that some gate moves; tied ones have one name
        self.names = {p: n for n, p in decoder.model.named_parameters() if n in changed}

    def moves(self, *modules: nn.Module) -> list[nn.Parameter]:
        """Parameters of some modules that a gate moves."""
        every = (p for module in modules for p in module.parameters() if p in self.names)
        return list(dict.fromkeys(every))

    @contextmanager
    def through(self, *modules: nn.Module) -> Iterator[_Stage]:
        """Weight gradients of some modules, dotted with the differences when the context ends."""
        parameters = self.moves(*modules)
        stage = _Stage(parameters)
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield stage
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        for parameter, gradient in stage.gradients.items():
            name = self.names[parameter]
            for vector, own in zip(self.vectors, self.found, strict=True):
                if name in vector.changed:
                    delta = vector.delta_of(name)
                    part = self.layouts[name].dotted(gradient, delta).double().cpu()
                    own[name] = own[name] + part if name in own else part


class _Stage:
    """Weight gradients of a few modules, summed over the terms."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}

    def back(
        self, output: torch.Tensor, entering: torch.Tensor | None, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Run back from the gradient of an output; returns that of what entered, if asked."""
        inputs = [*([] if entering is None else [entering]), *self.parameters]
        passed = torch.autograd.grad(output, inputs, gradient, allow_unused=True)
        of_parameters = passed if entering is None else passed[1:]
        for parameter, part in zip(self.parameters, of_parameters, strict=True):
            if part is not None:
                total = self.gradients.get(parameter)
                if total is None:  # autograd may have handed the same tensor out twice
                    dtype = torch.promote_types(part.dtype, torch.float32)
                    self.gradients[parameter] = part.to(dtype, copy=True)
                else:
                    total += part
        return gradient if entering is None else passed[0]
