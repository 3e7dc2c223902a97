"""Derivatives by every gate, summed over prompts: what fitting climbs.

    d v / d g_ec = grad_W v . Delta_ec        at W = B + sum over e, c of g_ec Delta_ec

where Delta_ec is the part of expert e's difference that gate c covers.

Unlike shares, a fit needs no value per prompt. Of experts that are LoRA adapters neither the weight
gradient nor the difference is formed, see `products`. Of others weight gradients are, but of one
layer at a time: one product over the tokens serves every expert, where keeping prompts apart
takes one for each; and a layer's differences are read once for all terms. The terms themselves stay
apart, so that none depends on which others go with it: other processes may take some.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_wp.components import GateLayout
from mergekit_wp.criteria import Targets, kl_values, reproduced
from mergekit_wp.engine.decoder import Decoder, first, hooked
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.products import Factors, products
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
    kept: Collection[int] = (),
) -> tuple[list[torch.Tensor], list[list[Slopes]]]:
    """Values of every term at the decoder's present weights, and its slope.

    The layers run forward and back once. Between the two, autograd's numbers are kept for some
    terms; for the others only what enters each layer, and the layers run forward once more.

    Args:
        decoder: the merge as it stands.
        terms: of the objective.
        layouts: how the gates of all tensors lie.
        vectors: the experts' task vectors.
        kept: numbers of the terms for which there is memory; results are the same.

    Returns:
        By term, values of ``kl`` and how much of the response is `reproduced`, ``[3, n]``; and for
        each task vector the slope by every gate; a tensor no value depends on is absent.
    """
    backward = _Backward(decoder, layouts, vectors, len(terms))
    with backward.watching():
        runs = [backward.run(i, term, kept=i in kept) for i, term in enumerate(terms)]
        values, flowing = [], []  # with the gradient of what left each term's last layer
        with backward.through(decoder.norm, decoder.head) as stage:
            for number, (term, run) in enumerate(zip(terms, runs, strict=True)):
                backward.number = number
                hidden = run[-1].output.detach().requires_grad_()
                batch, targets = term.batch, term.targets
                logits = decoder.logits(hidden[batch.rows, batch.cols])
                found = kl_values(logits, batch, targets)
                weight = torch.full_like(found, term.weight)
                flowing.append(stage.back(number, found, hidden, weight))
                same = reproduced(logits.detach(), batch, targets)
                values.append(torch.cat([found.detach().double()[None], same]))
        for layer in reversed(decoder.layers):
            with backward.through(layer) as stage:
                for number, run in enumerate(runs):
                    backward.number = number
                    call = run.pop()  # frees what was kept of it
                    output, entering = call.with_graph(layer)
                    flowing[number] = stage.back(number, output, entering, flowing[number])
        if backward.moves(*decoder.entrances):
            with backward.through(*decoder.entrances) as stage, _sparse(*decoder.entrances):
                for number, gradient in enumerate(flowing):
                    backward.number = number
                    stage.back(number, decoder.entering(terms[number].batch), None, gradient)
    return values, backward.on_cpu()


@dataclass
class _Call:
    """One layer's call: what entered it, and what it returned."""

    entering: torch.Tensor
    kwargs: dict[str, Any]
    output: torch.Tensor

    def with_graph(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Its output and input, with what lies between them."""
        if self.output.requires_grad:
            return self.output, self.entering
        entering = self.entering.detach().requires_grad_()
        return first(layer(entering, **self.kwargs)), entering


class _Backward:
    """Collects slopes from one stage of modules after the other."""

    def __init__(
        self,
        decoder: Decoder,
        layouts: Mapping[str, GateLayout],
        vectors: Sequence[TaskVector],
        terms: int,
    ) -> None:
        self.decoder, self.layouts, self.vectors = decoder, layouts, vectors
        #: by term and task vector, of every tensor the sum so far
        self.found: list[list[Slopes]] = [[{} for _ in vectors] for _ in range(terms)]
        changed = frozenset[str]().union(*(vector.changed for vector in vectors))
        moved = {p: n for n, p in decoder.model.named_parameters() if n in changed}
        #: of matrices their differences' factors, by the number of the task vector
        self.factors: dict[str, dict[int, Factors]] = {}
        self.products: dict[nn.Module, str] = {}
        shared = [module._parameters.get("weight") for module in decoder.entrances]  # a tied head
        for module in decoder.model.modules():
            weight = module._parameters.get("weight")
            if weight in moved and isinstance(module, nn.Linear | Conv1D):
                name = moved[weight]
                if not any(weight is other for other in shared):
                    self.factors[name] = self._factors(name)
                    self.products[module] = name
        #: tensors of which a weight gradient is formed; tied ones have one name
        self.names = {p: n for p, n in moved.items() if self._whole(n)}
        self.number = 0  # of the term that runs

    def _factors(self, name: str) -> dict[int, Factors]:
        every = ((e, v.factors_of(name)) for e, v in enumerate(self.vectors) if name in v.changed)
        return {e: factors for e, factors in every if factors is not None}

    def _whole(self, name: str) -> list[int]:
        """Numbers of the task vectors that have no factors of a tensor."""
        with_factors = self.factors.get(name, {})
        every = range(len(self.vectors))
        return [e for e in every if name in self.vectors[e].changed and e not in with_factors]

    def moves(self, *modules: nn.Module) -> list[nn.Parameter]:
        """Parameters of some modules of which a gradient is formed."""
        every = (p for module in modules for p in module.parameters() if p in self.names)
        return list(dict.fromkeys(every))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Dot what flows back through products whose difference has factors."""
        with hooked(
            [
                module.register_forward_hook(self._after)
                for module, name in self.products.items()
                if self.factors[name]
            ]
        ):
            yield

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Once a product with a matrix is made."""
        if not output.requires_grad:
            return
        number, entered, name = self.number, args[0].detach(), self.products[module]

        @torch.no_grad()
        def backward(gradient: torch.Tensor) -> None:
            p, q = gradient.flatten(0, -2), entered.flatten(0, -2)
            if isinstance(module, Conv1D):  # its matrix lies the other way round
                p, q = q, p
            layout = self.layouts[name]
            for e, factors in self.factors[name].items():
                self._add(number, e, name, layout.collect(factors.products(p, q, layout.parts)))

        output.register_hook(backward)

    def _add(self, number: int, e: int, name: str, part: torch.Tensor) -> None:
        own, part = self.found[number][e], part.double()
        own[name] = own[name] + part if name in own else part

    def run(self, number: int, term: Term, *, kept: bool) -> list[_Call]:
        """Run the layers on a term."""
        self.number = number
        calls: list[_Call] = []

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            names = [*signature(module.forward).parameters][: len(args)]
            hidden, *rest = args
            if kept:
                hidden = hidden.detach().requires_grad_()
            every = {**dict(zip(names[1:], rest, strict=True)), **kwargs}
            calls.append(_Call(hidden, every, hidden))
            return (hidden, *rest), kwargs

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            calls[-1].output = first(output)
            apart = calls[-1].output.detach()
            return (apart, *output[1:]) if isinstance(output, tuple) else apart

        layers, batch = self.decoder.layers, term.batch
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(after) for layer in layers]
        whole = self.moves(*layers) if kept else []
        with hooked(handles), torch.set_grad_enabled(kept), _wanted(whole):
            inputs = {"input_ids": batch.ids, "use_cache": False, **batch.arguments}
            self.decoder.model.base_model(**inputs)
        return calls

    @contextmanager
    def through(self, *modules: nn.Module) -> Iterator[_Stage]:
        """Weight gradients of some modules, dotted with the differences when the context ends."""
        moved = {self.names[parameter]: parameter for parameter in self.moves(*modules)}
        with brought(*modules) as here:
            parameters = {name: here.get(weight, weight) for name, weight in moved.items()}
            stage = _Stage(parameters)
            with _wanted(parameters.values()), torch.enable_grad():
                yield stage
        for name, of_terms in stage.gradients.items():
            layout = self.layouts[name]
            for e in self._whole(name):
                delta = self.vectors[e].delta_of(name)
                for number, gradient in of_terms.items():
                    self._add(
                        number, e, name, layout.collect(products(gradient, delta, layout.parts))
                    )

    def on_cpu(self) -> list[list[Slopes]]:
        """What was found."""
        return [
            [{name: slope.cpu() for name, slope in own.items()} for own in of_term]
            for of_term in self.found
        ]


@contextmanager
def _wanted(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let gradients of some parameters be asked for."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _sparse(*modules: nn.Module) -> Iterator[None]:
    """Let gradients of embeddings have the rows that are looked up alone, few of a vocabulary."""
    tables = [module for module in modules if isinstance(module, nn.Embedding)]
    before = [table.sparse for table in tables]
    try:
        for table in tables:
            table.sparse = True
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.sparse = own


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
