"""Derivatives by every gate, summed over prompts: what fitting climbs.

    d v / d g_ec = grad_W v . Delta_ec        at W = B + sum over e, c of g_ec Delta_ec

where Delta_ec is the part of expert e's difference that gate c covers.

Unlike shares, a fit needs no value per prompt. So weight gradients are formed after all, but of one
layer at a time: one product over the tokens serves every expert, where keeping prompts apart
takes one for each; and a layer's differences are read once for all terms. The terms themselves stay
apart, so that none depends on which others go with it: other processes may take some.
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
from mergekit_wp.models.offloaded import brought
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
) -> tuple[list[torch.Tensor], list[list[Slopes]]]:
    """Values of every term at the decoder's present weights, and its slope.

    The model runs forward twice and back once; between layers only what enters each is kept.

    Args:
        decoder: the merge as it stands.
        terms: of the objective.
        layouts: how the gates of all tensors lie.
        vectors: the experts' task vectors.

    Returns:
        By term, values of ``kl`` and whether the response is reproduced whole, ``[2, n]``; and for
        each task vector the slope by every gate; a tensor no value depends on is absent.
    """
    backward = _Backward(decoder, layouts, vectors, len(terms))
    with torch.no_grad():
        recordings = [record(decoder, term.batch) for term in terms]
    values, flowing = [], []  # with the gradient of what left each term's last layer
    last = len(decoder.layers) - 1
    with backward.through(decoder.norm, decoder.head) as stage:
        for number, (term, recording) in enumerate(zip(terms, recordings, strict=True)):
            hidden = recording.residual(last).detach().requires_grad_()
            batch, targets = term.batch, term.targets
            logits = decoder.logits(hidden[batch.rows, batch.cols])
            found = kl_values(logits, batch, targets)
            weight = torch.full_like(found, term.weight)
            flowing.append(stage.back(number, found, hidden, weight))
            same = reproduced(logits.detach(), batch, targets)
            values.append(torch.stack([found.detach().double(), same]))
    for index in range(last, -1, -1):
        with backward.through(decoder.layers[index]) as stage:
            flowing = [
                stage.back(number, *_again(decoder, recordings[number], index), gradient)
                for number, gradient in enumerate(flowing)
            ]
    if backward.moves(*decoder.entrances):
        with backward.through(*decoder.entrances) as stage:
            for number, gradient in enumerate(flowing):
                stage.back(number, decoder.entering(terms[number].batch), None, gradient)
    return values, backward.found


def _again(decoder: Decoder, recording: Recording, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output and input, with what lies between them."""
    call = recording.calls[index]
    entering = call.hidden.detach().requires_grad_()
    return first(decoder.layers[index](entering, **call.kwargs)), entering


class _Backward:
    """Collects slopes from one stage of modules after the other."""

    def __init__(
        self,
        decoder: Decoder,
        layouts: Mapping[str, GateLayout],
        vectors: Sequence[TaskVector],
        terms: int,
    ) -> None:
        self.layouts, self.vectors = layouts, vectors
        self.found: list[list[Slopes]] = [[{} for _ in vectors] for _ in range(terms)]
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
        moved = {self.names[parameter]: parameter for parameter in self.moves(*modules)}
        with brought(*modules) as here:
            parameters = {name: here.get(weight, weight) for name, weight in moved.items()}
            stage = _Stage(parameters)
            try:
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                with torch.enable_grad():
                    yield stage
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
        for name, of_terms in stage.gradients.items():
            for e, vector in enumerate(self.vectors):
                if name in vector.changed:
                    delta = vector.delta_of(name)
                    for number, gradient in of_terms.items():
                        part = self.layouts[name].dotted(gradient, delta).double().cpu()
                        own = self.found[number][e]
                        own[name] = own[name] + part if name in own else part


class _Stage:
    """Weight gradients of a few modules, by tensor name and number of the term."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: dict[str, dict[int, torch.Tensor]] = {name: {} for name in parameters}

    def back(
        self,
        term: int,
        output: torch.Tensor,
        entering: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        """Run one term back from the gradient of an output.

        Returns:
            The gradient of what entered, if asked.
        """
        inputs = [*([] if entering is None else [entering]), *self.parameters.values()]
        passed = torch.autograd.grad(output, inputs, gradient, allow_unused=True)
        of_parameters = passed if entering is None else passed[1:]
        for name, part in zip(self.parameters, of_parameters, strict=True):
            if part is not None:
                dtype = torch.promote_types(part.dtype, torch.float32)
                self.gradients[name][term] = part.to(dtype)
        return gradient if entering is None else passed[0]
