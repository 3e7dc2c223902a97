"""The fine partition: which component owns which slice of which tensor (DESIGN section 2).

Every weight of a model belongs to exactly one *fine* component:

- ``head`` (layer, h): Q rows of head h, its Q bias, O columns of head h
- ``kv_group`` (layer, g): K and V rows (and biases) of group g
- ``neuron`` (layer, j): gate row, up row (and their biases), down column
- ``tensor`` (name): every other tensor, whole

A tensor is cut along one dimension into equal blocks, block i belonging to component i of its
kind and layer. `TensorLayout` says which dimension and how many blocks; that is all a sweep or a
merge needs to know, so both work on whole tensors instead of looping over components.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from mergekit_wp.errors import UserError

Kind = Literal["layer", "tensor", "head", "kv_group", "neuron"]
FineKind = Literal["tensor", "head", "kv_group", "neuron"]
KINDS: tuple[Kind, ...] = ("layer", "tensor", "head", "kv_group", "neuron")
SLICED_KINDS: tuple[FineKind, ...] = ("head", "kv_group", "neuron")

#: model_type of transformers configs whose layers follow `_LLAMA_SLICES`.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

# suffix inside a layer -> (kind that owns its slices, dimension that is cut)
_LLAMA_SLICES: dict[str, tuple[FineKind, int]] = {
    "self_attn.q_proj.weight": ("head", 0),
    "self_attn.q_proj.bias": ("head", 0),
    "self_attn.o_proj.weight": ("head", 1),
    "self_attn.k_proj.weight": ("kv_group", 0),
    "self_attn.k_proj.bias": ("kv_group", 0),
    "self_attn.v_proj.weight": ("kv_group", 0),
    "self_attn.v_proj.bias": ("kv_group", 0),
    "mlp.gate_proj.weight": ("neuron", 0),
    "mlp.gate_proj.bias": ("neuron", 0),
    "mlp.up_proj.weight": ("neuron", 0),
    "mlp.up_proj.bias": ("neuron", 0),
    "mlp.down_proj.weight": ("neuron", 1),
}
_LAYER = re.compile(r"^model\.layers\.([0-9]{1,6})\.(.+)$")


@dataclass(frozen=True)
class Dims:
    """The numbers of a decoder that fix its components."""

    n_layers: int
    n_heads: int
    n_kv_groups: int
    n_neurons: int

    def count(self, kind: FineKind) -> int:
        """Components of a sliced kind in one layer."""
        return {"head": self.n_heads, "kv_group": self.n_kv_groups, "neuron": self.n_neurons}[kind]

    @classmethod
    def from_config(cls, config: Any) -> Dims:
        """Read the dimensions from a transformers config.

        Raises:
            UserError: the architecture has no component map.
        """
        if config.model_type not in LLAMA_FAMILY:
            raise UserError(
                f"architecture '{config.model_type}' has no component map; "
                f"supported: {', '.join(LLAMA_FAMILY)}"
            )
        heads = int(config.num_attention_heads)
        return cls(
            n_layers=int(config.num_hidden_layers),
            n_heads=heads,
            n_kv_groups=int(getattr(config, "num_key_value_heads", None) or heads),
            n_neurons=int(config.intermediate_size),
        )


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor is shared out among components.

    ``dim`` is the dimension cut into ``count`` equal blocks; for kind ``tensor`` it is None and
    the tensor is one component. ``layer`` is None outside the decoder layers.
    """

    name: str
    kind: FineKind
    layer: int | None
    dim: int | None
    count: int

    def block(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Rows (or columns) per component.

        Raises:
            UserError: the dimension is not a multiple of the component count.
        """
        if self.dim is None:
            return 1
        size = shape[self.dim]
        if size % self.count:
            raise UserError(
                f"{self.name}: dimension {self.dim} has {size} entries, "
                f"not a multiple of {self.count} {self.kind}s"
            )
        return size // self.count

    def index(self, component: int, shape: torch.Size | tuple[int, ...]) -> tuple[slice, ...]:
        """Index expression that selects one component's slice of the tensor."""
        if self.dim is None:
            return (slice(None),) * len(shape)
        block = self.block(shape)
        cut = slice(component * block, (component + 1) * block)
        return tuple(cut if d == self.dim else slice(None) for d in range(len(shape)))

    def expand(self, values: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Spread one value per component over the tensor, in a shape that broadcasts to it.

        Args:
            values: ``[count]``, or a scalar for kind ``tensor``.
            shape: the tensor's shape.

        Returns:
            A tensor of ``len(shape)`` dimensions, 1 everywhere but in the cut one.
        """
        if self.dim is None:
            return values.reshape((1,) * len(shape))
        spread = values.repeat_interleave(self.block(shape))
        return spread.reshape([-1 if d == self.dim else 1 for d in range(len(shape))])

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum entries of the cut dimension into components: ``[..., size]`` to ``[..., count]``."""
        if self.dim is None:
            return values.sum(-1, keepdim=True)
        blocks: torch.Tensor = values.unflatten(-1, (self.count, -1))
        return blocks.sum(-1)


def layout_of(name: str, dims: Dims) -> TensorLayout:
    """The layout of one named tensor of a Llama-family model."""
    match = _LAYER.match(name)
    if match is None:
        return TensorLayout(name, "tensor", None, None, 1)
    layer, suffix = int(match[1]), match[2]
    owner = _LLAMA_SLICES.get(suffix)
    if owner is None:
        return TensorLayout(name, "tensor", layer, None, 1)
    kind, dim = owner
    return TensorLayout(name, kind, layer, dim, dims.count(kind))


@dataclass(frozen=True)
class Component:
    """One set of weight slices that is swapped together."""

    kind: Kind
    layer: int | None
    index: int
    name: str


@dataclass(frozen=True)
class Partition:
    """All tensors of a model with their layouts, in checkpoint order."""

    dims: Dims
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def layouts(self) -> dict[str, TensorLayout]:
        """Layout by tensor name.

        Raises:
            UserError: a tensor's size does not fit the config's heads, groups or neurons.
        """
        layouts = {name: layout_of(name, self.dims) for name in self.shapes}
        for name, layout in layouts.items():
            layout.block(self.shapes[name])
        return layouts

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor, in order."""
        return tuple(self.shapes)

    @property
    def whole_tensors(self) -> tuple[str, ...]:
        """Tensors that are fine components by themselves."""
        return tuple(n for n, layout in self.layouts.items() if layout.kind == "tensor")

    def layer_tensors(self, layer: int) -> tuple[str, ...]:
        """Tensors of one decoder layer."""
        return tuple(n for n, layout in self.layouts.items() if layout.layer == layer)

    def owned_by(self, kind: FineKind, layer: int) -> tuple[TensorLayout, ...]:
        """Layouts whose slices belong to a sliced kind in one layer."""
        return tuple(
            layout
            for layout in self.layouts.values()
            if layout.kind == kind and layout.layer == layer
        )

    def slices(self, component: Component) -> dict[str, tuple[slice, ...]]:
        """Tensor name to index expression, for any component of any kind."""
        if component.kind == "tensor":
            names: tuple[str, ...] = (component.name,)
        elif component.kind == "layer":
            assert component.layer is not None
            names = self.layer_tensors(component.layer)
        else:
            assert component.layer is not None
            return {
                layout.name: layout.index(component.index, self.shapes[layout.name])
                for layout in self.owned_by(component.kind, component.layer)
            }
        return {name: (slice(None),) * len(self.shapes[name]) for name in names}

    def components(self, kind: Kind) -> Iterator[Component]:
        """All components of a kind, in the order of the score file's arrays."""
        if kind == "tensor":
            for i, name in enumerate(self.tensor_names):
                yield Component("tensor", self.layouts[name].layer, i, name)
        elif kind == "layer":
            for layer in range(self.dims.n_layers):
                yield Component("layer", layer, layer, f"layer {layer}")
        else:
            for layer in range(self.dims.n_layers):
                for i in range(self.dims.count(kind)):
                    yield Component(kind, layer, i, f"layer {layer} {kind} {i}")

    def fine_components(self) -> Iterator[Component]:
        """The fine partition: every weight exactly once."""
        for kind in SLICED_KINDS:
            yield from self.components(kind)
        whole = set(self.whole_tensors)
        yield from (c for c in self.components("tensor") if c.name in whole)
