"""Shares along the straight joint path B + a ΣΔ, by plain autograd: a rival of the guided path.

The prototype's best answer to the hard case. It is left out of the package, so
its scores are written as copies of the company's files whose ``path`` is 1 where the share along
the straight path is positive and 0 elsewhere: `fusion: path` then merges exactly those components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.smollm2.paths import BASE, BUILD, PROMPTS
from mergekit_wp.architectures import Dims
from mergekit_wp.components import Partition
from mergekit_wp.files import scorefile
from mergekit_wp.models.encoding import encode_pair
from mergekit_wp.prompts import read_prompts
from mergekit_wp.terms import SLICED_KINDS

POINTS = (0.25, 0.5, 0.75)
State = dict[str, torch.Tensor]


def weights(folder: Path) -> State:
    """A checkpoint's parameters in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Over the positions that predict the answer."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    found: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found


def shares(experts: Sequence[str], max_prompts: int) -> tuple[Partition, list[State]]:
    """For each expert and tensor: ``[components of the tensor]``, summed over the points."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    base = weights(BASE)
    deltas = []
    for expert in experts:
        theirs = weights(BUILD / "experts" / expert)
        deltas.append({name: theirs[name] - start for name, start in base.items()})
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    partition = Partition(Dims.from_config(model.config), shapes)

    def move_to(gates: Sequence[float]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                terms = (gate * delta[name] for gate, delta in zip(gates, deltas, strict=True))
                parameter.copy_(base[name] + sum(terms))

    tasks = []
    for b, expert in enumerate(experts):
        prompts = read_prompts(PROMPTS / f"{expert}.jsonl", max_prompts).prompts
        encoded = [encode_pair(tokenizer, p.prompt, p.response or "")[:2] for p in prompts]
        with torch.no_grad():
            move_to([float(e == b) for e in range(len(experts))])
            targets = [log_probabilities(model, *ids) for ids in encoded]
            move_to([0.0] * len(experts))
            distance = sum(
                _divergence(t, log_probabilities(model, *ids)).item()
                for t, ids in zip(targets, encoded, strict=True)
            )
        tasks.append((encoded, targets, distance))
    found: list[State] = [{} for _ in experts]
    for point in POINTS:
        move_to([point] * len(experts))
        model.zero_grad()
        for encoded, targets, distance in tasks:
            bar = tqdm(encoded, desc=f"straight path, {point}")
            for ids, target in zip(bar, targets, strict=True):
                (-_divergence(target, log_probabilities(model, *ids)) / distance).backward()
        for name, parameter in model.named_parameters():
            layout = partition.layouts[name]
            for e, delta in enumerate(deltas):
                product = parameter.grad * delta[name]
                if layout.whole:
                    part = product.sum().reshape(1)
                else:
                    other = [d for d in range(product.dim()) if d not in layout.dims]
                    part = layout.reduce(product.sum(other) if other else product)
                found[e][name] = found[e].get(name, 0.0) + part / len(POINTS)
    return partition, found


def _divergence(target: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    return (target.exp() * (target - ours)).sum(-1).mean()


def write_straight(experts: Sequence[str], company: Path, out: Path, max_prompts: int) -> None:
    """One score file per expert in ``out``: path 1 where the straight path's share is positive."""
    if all((out / f"{expert}.safetensors").exists() for expert in experts):
        return
    partition, found = shares(experts, max_prompts)
    for expert, by_tensor in zip(experts, found, strict=True):
        file = scorefile.read(company / f"{expert}.safetensors")
        tensors = dict(file.tensors)
        for kind in SLICED_KINDS:
            rows = [
                sum(by_tensor[layout.name] for layout in partition.owned_by(kind, layer))
                for layer in range(partition.dims.n_layers)
            ]
            tensors[f"path/kl/{kind}"] = (torch.stack(rows) > 0).float()
        whole = torch.stack([by_tensor[n].sum() for n in file.manifest.tensor_names])
        tensors["path/kl/tensor"] = (whole > 0).float()
        scorefile.write(replace(file, tensors=tensors), out / f"{expert}.safetensors")
