"""The naive truth: swap weights in a whole model, run it, compare. Shares no code with the engine
but the prompts' token ids and the partition's slices (which have tests of their own)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.components import Component, slices
from mergekit_wp.components import Partition

Sequences = Sequence[tuple[list[int], list[int]]]


def greedy(model: PreTrainedModel, prompt: list[int], n: int, eos: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


#: modules that heads and neurons write through, where they are not named as Llama's
WRITERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}


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
        for name, index in slices(partition, component).items():
            ours[name][index] = theirs[name][index]
    return model


def with_activation(
    receiver: PreTrainedModel, donor: PreTrainedModel, partition: Partition, component: Component
) -> PreTrainedModel:
    """A copy of the receiver in which one component writes what it writes in the donor's run.

    Both run whole and unpadded; hooks exchange what a component writes.
    """
    model, other = copy.deepcopy(receiver), copy.deepcopy(donor)
    kept: dict[str, tuple[tuple, object]] = {}

    def keep(name: str):
        def hook(_module, args, output) -> None:
            kept[name] = (args, output)

        return hook

    for name, module in other.named_modules():
        module.register_forward_hook(keep(name))
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: other(*args, **kwargs) and None, with_kwargs=True
    )
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    layers = layers_of(model)
    at = next(n for n, m in ours.items() if m is layers) + f".{component.layer}"
    attention, mlp = WRITERS.get(model.config.model_type, ("self_attn.o_proj", "mlp.down_proj"))

    def written(path: str, part) -> None:
        def hook(module, args, output):
            return output + part(theirs[path], *kept[path][0]) - part(module, *args)

        ours[path].register_forward_hook(hook)

    def columns(width: int):
        cut = slice(component.index * width, (component.index + 1) * width)

        def part(module, x):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            return x[..., cut] @ weight[:, cut].T

        return part

    def of_expert(experts, x, chosen, weights):
        expert, j = divmod(component.index, experts.down_proj.shape[-1])
        gate, up = (experts.gate_up_proj[expert].unflatten(0, (2, -1))[:, j] @ x.T).unbind()
        counts = (weights * (chosen == expert)).sum(-1)
        return torch.outer(experts.act_fn(gate) * up * counts, experts.down_proj[expert, :, j])

    def given(path: str, where: torch.Tensor | None = None) -> None:
        def hook(_module, _args, output):
            return kept[path][1] if where is None else torch.where(where, kept[path][1], output)

        ours[path].register_forward_hook(hook)

    if component.kind == "head":
        path = f"{at}.{attention}"
        width = ours[path].weight.numel() // model.config.hidden_size
        written(path, columns(width // model.config.num_attention_heads))
    elif component.kind == "neuron" and hasattr(ours[f"{at}.mlp"], "experts"):
        written(f"{at}.mlp.experts", of_expert)
    elif component.kind == "neuron":
        written(f"{at}.{mlp}", columns(1))
    elif component.kind == "kv_group":
        for name, index in slices(partition, component).items():
            path = name.rpartition(".")[0]
            owned = torch.zeros(partition.shapes[name], dtype=torch.bool)
            owned[index] = True
            if name.endswith(".weight"):
                given(path, owned.any(0 if isinstance(ours[path], Conv1D) else 1))
    elif component.kind == "layer":

        def added(_module, args, output):
            (x, *_), y = kept[at]
            return args[0] + (y - x)

        ours[at].register_forward_hook(added)
    else:
        given(component.name.rpartition(".")[0])
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
