"""The naive truth: swap weights in a whole model, run it, compare. Shares no code with the engine
but the prompts' token ids and the partition's slices (which have tests of their own)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mergekit_wp.components import Component, Partition

Sequences = Sequence[tuple[list[int], list[int]]]


def greedy(model: PreTrainedModel, prompt: list[int], n: int, eos: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def values(
    model: PreTrainedModel,
    expert: PreTrainedModel,
    sequences: Sequences,
    anchor: tuple[int, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Values ``[prompts]`` of every criterion, one prompt at a time, unpadded."""
    found: dict[str, list[torch.Tensor]] = {"kl": [], "logprob": [], "anchor": []}
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response])
        states: list[torch.Tensor] = []
        layer = 0 if anchor is None else anchor[0]
        handle = model.model.layers[layer].register_forward_hook(
            lambda _m, _i, out, states=states: states.append(
                out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        handle.remove()
        target = expert(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        found["kl"].append(-(target.exp() * (target - logprobs)).sum(-1).mean())
        found["logprob"].append(logprobs[range(len(response)), response].mean())
        if anchor is not None:
            found["anchor"].append(states[0][0, len(prompt) - 1] @ anchor[1])
    return {name: torch.stack(v) for name, v in found.items() if v}


def swapped(
    receiver: PreTrainedModel, donor: PreTrainedModel, partition: Partition, component: Component
) -> PreTrainedModel:
    """A copy of the receiver with one component from the donor."""
    model = copy.deepcopy(receiver)
    ours, theirs = dict(model.named_parameters()), dict(donor.named_parameters())
    with torch.no_grad():
        for name, index in partition.slices(component).items():
            ours[name][index] = theirs[name][index]
    return model


class Naive:
    """Gains and knockouts of single components by naive swapping, by every criterion."""

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        partition: Partition,
        sequences: Sequences,
        anchor: tuple[int, torch.Tensor] | None = None,
    ) -> None:
        self.base, self.expert, self.partition = base, expert, partition
        self.sequences, self.anchor = sequences, anchor
        self.at_base = values(base, expert, sequences, anchor)
        self.at_expert = values(expert, expert, sequences, anchor)

    def score(self, estimand: str, component: Component) -> dict[str, float]:
        pair = (self.base, self.expert) if estimand == "gain" else (self.expert, self.base)
        model = swapped(*pair, self.partition, component)
        scores = {}
        for name, value in values(model, self.expert, self.sequences, self.anchor).items():
            span = self.at_expert[name].mean() - self.at_base[name].mean()
            recovered = float((value.mean() - self.at_base[name].mean()) / span)
            scores[name] = recovered if estimand == "gain" else 1 - recovered
        return scores
