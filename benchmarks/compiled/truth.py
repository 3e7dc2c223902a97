"""What is true of a pair by construction: which components carry the change, and which pass it on.

No criterion is asked: weights are compared, and what single blocks write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.compiled.pairs import Pair, State
from benchmarks.components import Component, components, slices
from mergekit_wp.components import Partition
from mergekit_wp.terms import SLICED_KINDS

#: what a block writes differs where it differs by more
ROUNDING = 1e-6


@dataclass(frozen=True)
class Truth:
    """Sets of a pair's components by name.

    Attributes:
        live: heads, K/V groups and neurons that do anything: tracr fills layers up with zeros.
        changed: whose weights differ.
        active: of these, those that write something else, given the same input, on some input of
            either run; the others wait for tokens that never come.
        passing: whose weights are alike and who write something else in the expert's run: what
            activations show, and weights do not.
    """

    live: tuple[Component, ...]
    changed: frozenset[str]
    active: frozenset[str]
    passing: frozenset[str]


def truth(pair: Pair) -> Truth:
    """Of a pair as it was compiled."""
    base, expert = pair.states["base"], pair.states["expert"]
    live = tuple(
        c
        for kind in SLICED_KINDS
        for c in components(pair.partition, kind)
        if any(size(pair.partition, state, c) for state in (base, expert))
    )
    changed = [c for c in live if size(pair.partition, difference(base, expert), c)]
    runs = [Run(pair, state) for state in (base, expert)]
    active = [c for c in changed if any(run.writes_else(c, base, expert) for run in runs)]
    names = {c.name for c in changed}
    passing = [c for c in live if c.name not in names and runs[0].written(c, runs[1])]
    return Truth(live, frozenset(names), *(frozenset(c.name for c in x) for x in (active, passing)))


def difference(base: State, expert: State) -> State:
    """The task vector, in float64."""
    return {name: expert[name].double() - tensor.double() for name, tensor in base.items()}


def size(partition: Partition, state: State, component: Component) -> float:
    """Frobenius norm of a component's weights."""
    parts = slices(partition, component).items()
    return math.sqrt(sum(float(state[name][index].square().sum()) for name, index in parts))


def swapped(pair: Pair, state: State, component: Component, other: State) -> State:
    """A state with one component of another."""
    found = dict(state)
    for name, index in slices(pair.partition, component).items():
        found[name] = state[name].clone()
        found[name][index] = other[name][index]
    return found


class Run:
    """What enters every block of a model on the pair's inputs, and what heads and neurons write."""

    def __init__(self, pair: Pair, state: State) -> None:
        self.pair, self.model = pair, pair.model(state)
        self.entering: dict[str, torch.Tensor] = {}
        self.read: dict[str, torch.Tensor] = {}
        handles = list(self._record())
        self.model(pair.ids)
        for handle in handles:
            handle.remove()

    def _record(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def keep(into: dict[str, torch.Tensor], key: str) -> object:
            return lambda _module, args: into.__setitem__(key, args[0])

        for i, layer in enumerate(self.model.model.layers):
            for block, out in (("self_attn", "o_proj"), ("mlp", "down_proj")):
                module = getattr(layer, block)
                yield module.register_forward_pre_hook(keep(self.entering, f"{i}.{block}"))
                yield getattr(module, out).register_forward_pre_hook(
                    keep(self.read, f"{i}.{block}")
                )

    def writes_else(self, component: Component, base: State, expert: State) -> bool:
        """Whether a component's block writes else with its weights exchanged, by either state."""
        block = _block(component)
        hidden = self.entering[f"{component.layer}.{block}"]

        def output(state: State) -> torch.Tensor:
            module = getattr(self.pair.model(state).model.layers[component.layer], block)
            found = module(hidden)
            return found[0] if isinstance(found, tuple) else found

        return any(
            float((output(swapped(self.pair, one, component, other)) - output(one)).abs().max())
            > ROUNDING
            for one, other in ((base, expert), (expert, base))
        )

    def written(self, component: Component, other: Run) -> bool:
        """Whether a component writes else in another run."""
        one, two = (run._writes(component) for run in (self, other))
        return float((one - two).abs().max()) > ROUNDING

    def _writes(self, component: Component) -> torch.Tensor:
        block = _block(component)
        module = getattr(self.model.model.layers[component.layer], block)
        if component.kind == "kv_group":
            hidden, size = self.entering[f"{component.layer}.{block}"], self.pair.config.head_dim
            rows = slice(component.index * size, (component.index + 1) * size)
            return torch.cat([to(hidden)[..., rows] for to in (module.k_proj, module.v_proj)], -1)
        out = module.down_proj if block == "mlp" else module.o_proj
        width = 1 if block == "mlp" else self.pair.config.head_dim
        cut = slice(component.index * width, (component.index + 1) * width)
        read = self.read[f"{component.layer}.{block}"][..., cut]
        return read @ out.weight[:, cut].T


def _block(component: Component) -> str:
    return "mlp" if component.kind == "neuron" else "self_attn"
