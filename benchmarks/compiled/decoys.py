"""Changes of weights that no function of the model can see, so that |Δ| is not the answer.

In a compiled pair every weight that differs carries the change, and |Δ| names the carriers without
looking at anything. Training moves all weights. So every component that does not carry the change
gets other weights with which it computes the same, in whatever company:

- a neuron reads s times as much and writes 1/s of it (ReLU: exactly the same);
- a head gets queries where its keys are 0, and writes out of places that its values leave 0;
- a K/V group gets keys where the queries are 0, and values that nobody writes out.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.compiled.pairs import Pair, State
from benchmarks.compiled.truth import Truth, difference, size
from benchmarks.components import Component


def with_decoys(pair: Pair, truth: Truth, seed: int) -> Pair:
    """The pair with an expert that differs from the base in every component that can."""
    generator = torch.Generator().manual_seed(seed)
    base = pair.states["base"]
    delta = difference(base, pair.states["expert"])
    sizes = [size(pair.partition, delta, c) for c in truth.live if c.name in truth.changed]
    expert = {name: tensor.clone() for name, tensor in pair.states["expert"].items()}
    for component in truth.live:
        if component.name not in truth.changed:
            drawn = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
            if component.kind == "neuron":
                _scale(expert, component, generator)
            else:
                _fill(pair, expert, component, drawn, generator)
    return replace(pair, states={"base": base, "expert": expert})


def _scale(expert: State, neuron: Component, generator: torch.Generator) -> None:
    up, down = (f"model.layers.{neuron.layer}.mlp.{x}_proj.weight" for x in ("up", "down"))
    factor = 2.0 if torch.rand(1, generator=generator) < 0.5 else 0.5  # powers of 2 round nothing
    expert[up][neuron.index] *= factor
    expert[down][:, neuron.index] /= factor


def _fill(
    pair: Pair, expert: State, component: Component, norm: float, generator: torch.Generator
) -> None:
    """Draw weights in the dimensions of a head that nothing else of it uses, in either model.

    Even ones are the head's, odd ones the K/V group's: both may come together.
    """
    width, layer = pair.config.head_dim, component.layer
    start = component.index * width
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    states = (pair.states["base"], pair.states["expert"])
    for mine, other in (("q", "k"), ("o", "v")):
        mine, other = (mine, other) if component.kind == "head" else (other, mine)
        for dim in range(start, start + width):
            if dim % 2 != (component.kind == "kv_group"):
                continue
            weights = [_along(s, layer, x, dim) for s in states for x in (mine, other)]
            if not any(weight.any() for weight in weights):
                row = _along(expert, layer, mine, dim)
                found.append((row, torch.randn(row.shape, generator=generator)))
    total = torch.cat([noise for _, noise in found]).norm() if found else None
    for row, noise in found:
        row += noise * norm / total


def _along(state: State, layer: int | None, which: str, dim: int) -> torch.Tensor:
    """A row of q, k or v, or a column of o."""
    weight = state[f"model.layers.{layer}.self_attn.{which}_proj.weight"]
    return weight[:, dim] if which == "o" else weight[dim]
