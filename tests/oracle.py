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


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers: the first list of modules there is."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


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
        handle = layers_of(model)[layer].register_forward_hook(
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


def with_activation(
    receiver: PreTrainedModel, donor: PreTrainedModel, partition: Partition, component: Component
) -> PreTrainedModel:
    """A copy of the receiver in which one component writes what it writes in the donor's run.

    Both run whole and unpadded; hooks exchange what a component writes.
    """
    model, other = copy.deepcopy(receiver), copy.deepcopy(donor)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str):
        def hook(_module, args, output) -> None:
            x = args[0] if args else None
            kept[name] = (x, output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in other.named_modules():
        module.register_forward_hook(keep(name))
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: other(*args, **kwargs) and None, with_kwargs=True
    )
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    at = f"model.layers.{component.layer}"

    def written(path: str, width: int) -> None:
        cut = slice(component.index * width, (component.index + 1) * width)

        def hook(module, args, output):
            their_write = kept[path][0][..., cut] @ theirs[path].weight[:, cut].T
            return output + their_write - args[0][..., cut] @ module.weight[:, cut].T

        ours[path].register_forward_hook(hook)

    def given(path: str, cut: slice) -> None:
        def hook(_module, _args, output):
            output = output.clone()
            output[..., cut] = kept[path][1][..., cut]
            return output

        ours[path].register_forward_hook(hook)

    if component.kind == "head":
        written(f"{at}.self_attn.o_proj", model.model.layers[0].self_attn.head_dim)
    elif component.kind == "neuron":
        written(f"{at}.mlp.down_proj", 1)
    elif component.kind == "kv_group":
        width = model.model.layers[0].self_attn.head_dim
        for name in ("k_proj", "v_proj"):
            cut = slice(component.index * width, (component.index + 1) * width)
            given(f"{at}.self_attn.{name}", cut)
    elif component.kind == "layer":

        def added(_module, args, output):
            x, y = kept[at]
            return args[0] + y - x

        ours[at].register_forward_hook(added)
    else:
        given(component.name.rpartition(".")[0], slice(None))
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
        gain = estimand.endswith("gain")
        pair = (self.base, self.expert) if gain else (self.expert, self.base)
        patch = with_activation if estimand.startswith("activation") else swapped
        model = patch(*pair, self.partition, component)
        scores = {}
        for name, value in values(model, self.expert, self.sequences, self.anchor).items():
            span = self.at_expert[name].mean() - self.at_base[name].mean()
            recovered = float((value.mean() - self.at_base[name].mean()) / span)
            scores[name] = recovered if gain else 1 - recovered
        return scores
