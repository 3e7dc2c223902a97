"""Components one by one, with the slices of weights that they own: what naive swapping goes by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mergekit_wp.components import Partition, Shape, TensorLayout
from mergekit_wp.terms import SLICED_KINDS, Kind

Index = tuple[slice | torch.Tensor, ...]


@dataclass(frozen=True)
class Component:
    """One set of weight slices that is swapped together."""

    kind: Kind
    layer: int | None
    index: int
    name: str


def components(partition: Partition, kind: Kind) -> Iterator[Component]:
    """All components of a kind, in the order of the score file's arrays."""
    if kind == "tensor":
        for i, name in enumerate(partition.tensor_names):
            yield Component("tensor", partition.layouts[name].layer, i, name)
    elif kind == "layer":
        for layer in range(partition.dims.n_layers):
            yield Component("layer", layer, layer, f"layer {layer}")
    else:
        for layer in range(partition.dims.n_layers):
            for i in range(partition.dims.count(kind)):
                yield Component(kind, layer, i, f"layer {layer} {kind} {i}")


def fine_components(partition: Partition) -> Iterator[Component]:
    """The fine partition: every weight exactly once."""
    for kind in SLICED_KINDS:
        yield from components(partition, kind)
    whole = set(partition.whole_tensors)
    yield from (c for c in components(partition, "tensor") if c.name in whole)


def slices(partition: Partition, component: Component) -> dict[str, Index]:
    """Tensor name to index expression, for any component of any kind."""
    if component.kind == "tensor":
        names: tuple[str, ...] = (component.name,)
    elif component.kind == "layer":
        assert component.layer is not None
        names = partition.layer_tensors(component.layer)
    else:
        assert component.layer is not None
        kind = component.kind
        return {
            layout.name: part_of(
                layout, layout.start(kind) + component.index, partition.shapes[layout.name]
            )
            for layout in partition.owned_by(kind, component.layer)
        }
    return {name: (slice(None),) * len(partition.shapes[name]) for name in names}


def part_of(layout: TensorLayout, component: int, shape: Shape) -> Index:
    """Index expression of one component's part of a tensor, by its position among them."""
    if layout.whole:
        return (slice(None),) * len(shape)
    if len(layout.runs) > 1 or len(layout.dims) > 1:
        return (layout.expand(torch.arange(layout.count) == component, shape).expand(shape),)
    block = layout.block(shape)
    cut = slice(component * block, (component + 1) * block)
    return tuple(cut if d in layout.dims else slice(None) for d in range(len(shape)))
