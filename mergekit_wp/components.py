"""The fine partition: which component owns which slice of which tensor.

Every weight of a model belongs to exactly one *fine* component:

- ``head`` (layer, h): Q rows of head h, its Q bias, O columns of head h
- ``kv_group`` (layer, g): K and V rows (and biases) of group g
- ``neuron`` (layer, j): gate row, up row (and their biases), down column
- ``tensor`` (name): every other tensor, whole

A tensor is cut into equal blocks, each of which belongs to one component of its layer; a tensor
may hold several kinds (a fused Q, K and V). `TensorLayout` says which block belongs to whom; that
is all a sweep or a merge needs to know, so both work on whole tensors instead of looping over
components. Which tensors are cut how is declared by architecture in `architectures`.

The gates of a fit lie by these components, or finer: then every tensor has `OwnGates`. Both spread
gates over a tensor and sum gradients into gates, so nothing that merges or fits asks which it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.errors import UserError
from mergekit_wp.terms import FineKind, GateGranularity, Kind

Shape = torch.Size | tuple[int, ...]


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor is shared out among components.

    The *components of the tensor* are those that own a part of it, in the order of ``owners``;
    whatever has one value for each of them is ``[count]``.

    Attributes:
        name: the tensor.
        layer: its decoder layer, None outside of them.
        owners: kinds that own parts of it, with the number of their components in the layer;
            ``tensor`` alone where the tensor is one component.
        dims: the cut dimensions, see `Cut`; none where the tensor is one component.
        runs: the kinds whose blocks follow each other, see `Cut.kinds`.
        interleaved: see `Cut`.
    """

    name: str
    layer: int | None
    owners: tuple[tuple[FineKind, int], ...] = (("tensor", 1),)
    dims: tuple[int, ...] = ()
    runs: tuple[FineKind, ...] = ()
    interleaved: bool = False

    @property
    def whole(self) -> bool:
        """Whether the tensor is one component by itself."""
        return not self.dims

    @property
    def kinds(self) -> tuple[FineKind, ...]:
        """Kinds that own parts of it."""
        return tuple(kind for kind, _ in self.owners)

    @property
    def count(self) -> int:
        """Components that own parts of it."""
        return sum(count for _, count in self.owners)

    def start(self, kind: FineKind) -> int:
        """Position of a kind's first component among those of the tensor."""
        position = 0
        for owner, count in self.owners:
            if owner == kind:
                return position
            position += count
        raise ValueError(f"{self.name} has no {kind}")

    def block(self, shape: Shape) -> int:
        """Rows (or columns) of one block.

        Raises:
            UserError: the dimension is not a multiple of the number of blocks.
        """
        if self.whole:
            return 1
        counts = dict(self.owners)
        size, blocks = math.prod(shape[d] for d in self.dims), sum(counts[k] for k in self.runs)
        chunks = self._chunks(shape)
        if size % blocks or any(count % chunks for count in counts.values()):
            what = " and ".join(f"{kind}s" for kind in self.kinds)
            raise UserError(
                f"{self.name}: dimension {self.dims[-1]} has {size} entries, "
                f"not a multiple of {blocks} {what}"
            )
        return size // blocks

    def _chunks(self, shape: Shape) -> int:
        """Runs of the same pattern, one after the other."""
        if len(self.dims) == 2:
            return shape[self.dims[0]]
        return self.owners[0][1] if self.interleaved else 1

    @property
    def _plain(self) -> bool:
        """Whether block i belongs to component i."""
        return len(self.runs) == 1 and len(self.dims) == 1

    def places(self, shape: Shape) -> torch.Tensor:
        """Of every entry of the cut dimensions, in their shape, the tensor's component: int64."""
        flat = _places(self.owners, self.runs, self._chunks(shape), self.block(shape))
        return flat.view([shape[d] for d in self.dims])

    def expand(self, values: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Spread one value per component over the tensor, in a shape that broadcasts to it.

        Args:
            values: ``[count]``, or a scalar for a tensor that is one component.
            shape: the tensor's shape.

        Returns:
            A tensor of ``len(shape)`` dimensions, 1 everywhere but in the cut ones.
        """
        if self.whole:
            return values.reshape((1,) * len(shape))
        if self._plain:
            spread = values.repeat_interleave(self.block(shape))
        else:
            spread = values[self.places(shape).to(values.device)]
        return spread.reshape([shape[d] if d in self.dims else 1 for d in range(len(shape))])

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum entries of the cut dimensions into components.

        Args:
            values: ``[..., size]``, with two cut dimensions ``[..., size, size]``; the last of a
                tensor that is one component are summed as well.

        Returns:
            ``[..., count]``.
        """
        if self.whole:
            return values.sum(-1, keepdim=True)
        if self._plain:
            blocks: torch.Tensor = values.unflatten(-1, (self.count, -1))
            return blocks.sum(-1)
        cut = len(self.dims)
        shape = dict(zip(self.dims, values.shape[-cut:], strict=True))
        extents = tuple(shape.get(d, 1) for d in range(max(self.dims) + 1))
        places = self.places(extents).flatten().to(values.device)
        total = values.new_zeros((*values.shape[:-cut], self.count))
        return total.index_add_(-1, places, values.flatten(-cut))

    def spread(self, gates: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, ...]:
        """Gates of several experts over the tensor; see `OwnGates.spread`."""
        return (torch.stack([self.expand(gate, shape) for gate in gates]),)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """See `OwnGates`."""
        return (self.dims,)

    def collect(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums over all but the dimensions of each of `parts` into components, ``[count]``."""
        (own,) = sums
        return self.reduce(own.reshape(-1) if self.whole else own)


@lru_cache(maxsize=64)
def _places(
    owners: tuple[tuple[FineKind, int], ...], runs: tuple[FineKind, ...], chunks: int, block: int
) -> torch.Tensor:
    starts, position = {}, 0
    for kind, count in owners:
        starts[kind] = torch.arange(position, position + count, device="cpu").view(chunks, -1)
        position += count
    return torch.cat([starts[kind] for kind in runs], 1).flatten().repeat_interleave(block)


@dataclass(frozen=True)
class OwnGates:
    """Gates of one tensor that it shares with no other, finer than its components.

    Attributes:
        name: the tensor.
        shape: of the tensor.
        parts: dimensions over which gates lie, which run through these as the tensor does; what
            several parts say of an entry is added, so that weights stay linear in all gates.
        block: so many gates in a row are one.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    block: int = 1

    @property
    def counts(self) -> list[int]:
        """Gates of each part."""
        return [math.prod(self.shape[d] for d in dims) // self.block for dims in self.parts]

    @property
    def count(self) -> int:
        """Gates in all."""
        return sum(self.counts)

    def spread(self, gates: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, ...]:
        """Gates of several experts over the tensor.

        Args:
            gates: ``[experts, count]``.
            shape: the tensor's shape.

        Returns:
            What is to be added to have every weight's gate, each ``[experts, ...]`` in a shape that
            broadcasts to the tensor behind the experts.

        Raises:
            UserError: gates of a tensor of another shape.
        """
        found = []
        for dims, part in zip(self.parts, gates.split(self.counts, -1), strict=True):
            if len(shape) != len(self.shape) or any(shape[d] != self.shape[d] for d in dims):
                raise UserError(
                    f"tensor {self.name} has shape {list(shape)}, but its gates were fitted for "
                    f"{list(self.shape)}"
                )
            sizes = [shape[d] if d in dims else 1 for d in range(len(shape))]
            found.append(part.repeat_interleave(self.block, -1).reshape(-1, *sizes))
        return tuple(found)

    def collect(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums over all but the dimensions of each of `parts` into gates, ``[count]``."""
        return torch.cat([own.reshape(-1, self.block).sum(-1) for own in sums])


#: how the gates of one tensor lie; both have ``count``, ``parts``, ``spread`` and ``collect``
GateLayout = TensorLayout | OwnGates


def gate_layouts(
    dims: Dims, shapes: Mapping[str, tuple[int, ...]], granularity: GateGranularity
) -> dict[str, GateLayout]:
    """How the gates of all tensors lie.

    ``component`` has one gate for each component, which tensors share. ``slice`` has one for each
    block of a tensor. ``channel`` has one for each entry of the cut dimensions; where nothing is
    cut, of the last. ``row_column`` has one for each row and one for each column of a matrix, added
    up; of the embedding and the head only the columns, as rows are tokens, which a merge may
    rearrange. A tensor of one dimension has one for each entry.

    Raises:
        UserError: a tensor's shape does not fit its cut.
    """
    architecture = dims.architecture
    vocabularies = (architecture.embedding, architecture.head)
    found: dict[str, GateLayout] = {}
    for name, shape in shapes.items():
        layout, n = layout_of(name, dims), len(shape)
        if layout.dims and max(layout.dims) >= n:
            raise UserError(f"{name}: shape {list(shape)} has no dimension {max(layout.dims)}")
        block = layout.block(shape)
        channels = layout.dims or ((n - 1,) if n else ())
        if granularity == "component":
            found[name] = layout
        elif granularity == "slice":
            found[name] = OwnGates(name, shape, (layout.dims,), block)
        elif granularity == "channel" or n < 2 or module_of(name) in vocabularies:
            found[name] = OwnGates(name, shape, (channels,))
        else:
            lead = tuple(range(n - 2))
            found[name] = OwnGates(name, shape, ((*lead, n - 2), (*lead, n - 1)))
    return found


def positions(layouts: Mapping[str, GateLayout]) -> dict[str, slice]:
    """Where the gates of every tensor stand in a flat vector that has them one after the other."""
    ends = accumulate(layout.count for layout in layouts.values())
    both = zip(layouts.items(), ends, strict=True)
    return {name: slice(end - layout.count, end) for (name, layout), end in both}


def layout_of(name: str, dims: Dims) -> TensorLayout:
    """The layout of one named tensor."""
    place = dims.architecture.within_layer(name)
    if place is None:
        return TensorLayout(name, None)
    layer, suffix = place
    if not dims.architecture.mapped and layer >= dims.n_layers:
        return TensorLayout(name, None)  # a number that counts something else
    cut = dims.architecture.cuts.get(suffix)
    if cut is None:
        return TensorLayout(name, layer)
    owners = tuple((kind, dims.count(kind)) for kind in dict.fromkeys(cut.kinds))
    return TensorLayout(name, layer, owners, cut.dims, cut.kinds, cut.interleaved)


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
        return tuple(n for n, layout in self.layouts.items() if layout.whole)

    @cached_property
    def _whole_position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.whole_tensors)}

    def layer_tensors(self, layer: int) -> tuple[str, ...]:
        """Tensors of one decoder layer."""
        return tuple(n for n, layout in self.layouts.items() if layout.layer == layer)

    def within_layer(self, layer: int) -> dict[str, str]:
        """The same by their names within the layer."""
        start = self.dims.architecture.within_layer
        places = {name: start(name) for name in self.layer_tensors(layer)}
        return {place[1]: name for name, place in places.items() if place is not None}

    def owned_by(self, kind: FineKind, layer: int) -> tuple[TensorLayout, ...]:
        """Layouts whose slices belong to a sliced kind in one layer."""
        every = self.layouts.values()
        return tuple(own for own in every if kind in own.kinds and own.layer == layer)

    def views(self, values: Mapping[Kind, torch.Tensor], name: str) -> list[torch.Tensor]:
        """Where the values of one tensor's components stand, a view for each of its owners.

        Args:
            values: over the fine partition: ``[..., layers, count]`` by sliced kind, ``[...,
                whole tensors]`` under ``tensor``.
            name: the tensor.

        Returns:
            ``[..., components]`` for each of the layout's owners.
        """
        layout = self.layouts[name]
        if layout.whole:
            i = self._whole_position[name]
            return [values["tensor"][..., i : i + 1]]
        assert layout.layer is not None
        return [values[kind][..., layout.layer, :] for kind in layout.kinds]

    def of_tensor(self, values: Mapping[Kind, torch.Tensor], name: str) -> torch.Tensor:
        """The values of one tensor's components, ``[..., count]``; see `views`."""
        return torch.cat(self.views(values, name), -1)

    def add(self, values: Mapping[Kind, torch.Tensor], name: str, more: torch.Tensor) -> None:
        """Add ``[..., count]`` to the values of one tensor's components, in place."""
        for view, part in self._by_owner(values, name, more):
            view.add_(part)

    def put(self, values: Mapping[Kind, torch.Tensor], name: str, new: torch.Tensor) -> None:
        """Set the values of one tensor's components to ``[..., count]``, in place."""
        for view, part in self._by_owner(values, name, new):
            view.copy_(part)

    def _by_owner(
        self, values: Mapping[Kind, torch.Tensor], name: str, given: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        counts = [count for _, count in self.layouts[name].owners]
        return zip(self.views(values, name), given.split(counts, -1), strict=True)
