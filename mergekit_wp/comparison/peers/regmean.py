"""RegMean (Jin et al., arXiv 2212.09849) and RegMean++ (Nguyen et al., arXiv 2508.03121).

A linear layer of the merge is to give what each expert's gives on that expert's inputs:
W = (Σ_e W_e·G_e)·(Σ_e G_e)⁻¹, where G_e = XᵀX/n is the Gram matrix of the inputs and its entries
off the diagonal are multiplied by ``off_diagonal`` first (`regmean_utils.py` of uiuctml/MergeBench,
after bloomberg/dataless-model-merging). Everything else is averaged, embeddings as well, as in the
paper; MergeBench leaves these the base's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.engine.decoder import Decoder, first, hooked
from mergekit_wp.engine.replay import record
from mergekit_wp.prompts import PromptBatch


def regressed(one: OneTensor, _setting: Setting) -> torch.Tensor:
    """What was learned, else the mean."""
    if one.name in one.learned:
        return one.learned[one.name].to(one.base) - one.base
    return one.vectors.mean(0)


def reg_mean(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """Linear layers of the decoder, each from inputs that the expert's own earlier layers make."""
    return _layer_by_layer(sources, setting, onward_by_merge=False)


def reg_mean_plus(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """The same from inputs that the merge's earlier layers make.

    The experts' prompts enter the first layer through the averaged embeddings; else this is
    `regmean_plusplus.py` of uiuctml/MergeBench.
    """
    return _layer_by_layer(sources, setting, onward_by_merge=True)


def regression(weights: torch.Tensor, grams: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    """The weight that gives closest to what the experts' give on their inputs.

    Args:
        weights: ``[experts, out, in]``.
        grams: of each expert's inputs, ``[experts, in, in]``.
        off_diagonal: factor of entries off the diagonal.

    Returns:
        ``[out, in]``: the mean of the weights where inputs do not determine it. There MergeBench's
        pseudoinverse gives zero, which forgets what the experts share.
    """
    eye = torch.eye(grams.shape[-1], dtype=torch.bool, device=grams.device)
    damped = torch.where(eye, grams, off_diagonal * grams).double()
    total, mean = damped.sum(0), weights.double().mean(0)
    goal = ((weights.double() - mean) @ damped).sum(0)
    # relative to their own size, as few inputs of a language model are far larger than all others
    own = total.diagonal().rsqrt().nan_to_num(posinf=0.0)
    # their sums are float32, whose rounding, about a quarter of this, must not be inverted
    rounding = len(eye) ** 0.5 * torch.finfo(torch.float32).eps
    inverse = torch.linalg.pinv(own[:, None] * total * own, hermitian=True, atol=rounding)
    found: torch.Tensor = mean + (goal * own) @ inverse * own
    return found.to(weights.dtype)


@dataclass
class _Flow:
    """One batch of an expert's prompts on its way through the layers.

    Attributes:
        hidden: present input of the next layer, ``[rows, T, hidden]``.
        arguments: what each layer is called with besides.
        real: which positions are no padding, ``[rows, T]``.
    """

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]
    real: torch.Tensor

    @classmethod
    def enter(cls, decoder: Decoder, batch: PromptBatch) -> _Flow:
        calls = record(decoder, batch).calls
        ends = batch.last.clone()
        ends.scatter_reduce_(0, batch.owners, batch.cols, "amax")
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        arguments = [call.kwargs for call in calls]
        return cls(calls[0].hidden, arguments, places <= ends[:, None])

    def through(self, layer: nn.Module, index: int) -> torch.Tensor:
        return first(layer(self.hidden, **self.arguments[index]))


class _Grams:
    """Gram matrices ``[in, in]`` of the inputs of some linear modules, by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.real = torch.zeros(0, dtype=torch.bool)
        self.handles = [
            module.register_forward_pre_hook(partial(self._add, name))
            for name, module in modules.items()
        ]

    def _add(self, name: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[:2] != self.real.shape:
            return  # a layer of some tokens only, such as an expert behind a router: it is averaged
        x = args[0][self.real].float()
        gram = x.T @ x
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram
        self.counts[name] += len(x)

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.counts[name]


@torch.no_grad()
def _layer_by_layer(
    sources: Sources, setting: Setting, *, onward_by_merge: bool
) -> dict[str, torch.Tensor]:
    """One layer of one expert at a time, on the hidden states of all prompts."""
    prompted, off_diagonal = sources.prompted, float(setting["off_diagonal"])
    model, decoder = prompted.model, Decoder(prompted.model.model)
    flows: list[list[_Flow]] = []
    for e, expert in enumerate(sources.experts):
        model.fill(sources.average if onward_by_merge else expert.read)
        flows.append([_Flow.enter(decoder, b) for b in prompted.batches(e, prompted.at_once.size)])
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(decoder.layers):
        prefix = f"{decoder.architecture.layers}.{index}."
        parameters = {f"{prefix}{name}": p for name, p in layer.named_parameters()}
        modules = {f"{prefix}{name}.weight": module for name, module in layer.named_modules()}
        linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
        grams: list[_Grams] = []
        for expert, own in zip(sources.experts, flows, strict=True):
            for name, parameter in parameters.items():
                expert.read(name, parameter)
            grams.append(_Grams(linear))
            with hooked(grams[-1].handles):
                for flow in own:
                    grams[-1].real = flow.real
                    out = flow.through(layer, index)
                    flow.hidden = flow.hidden if onward_by_merge else out
        for name, parameter in parameters.items():
            base, vectors = sources.vectors(name)
            merged = base + vectors.mean(0)
            if all(name in gram.sums for gram in grams):
                of_inputs = torch.stack([gram.mean(name) for gram in grams]).to(base.device)
                merged = regression(base + vectors, of_inputs, off_diagonal)
                found[name] = merged.cpu()
            parameter.copy_(merged)
        if onward_by_merge:
            for flow in (flow for own in flows for flow in own):
                flow.hidden = flow.through(layer, index)
    sources.spent(passes=(3 if onward_by_merge else 2) * prompted.count)
    return found
