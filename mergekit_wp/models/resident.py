"""The one model that is run: base, expert, or anything between the two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import option
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.memory import in_gib
from mergekit_wp.models.offloaded import Offloaded, fetch_when_called
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.placement import DISK, MaxMemory, placement


class ResidentModel:
    """The one model in memory, whose weights are overwritten in place.

    Args:
        pair: where weights come from.
        dtype: dtype of weights and activations.
        device: torch device name; all computing is there.
        max_memory: of weights that may be kept on each device; None for all of them on `device`.
            What is kept elsewhere comes there for the moment that it is used.

    Attributes:
        size: bytes of weights by the place where they are kept.
        fetched: bytes of weights that have come from elsewhere so far.
    """

    def __init__(
        self, pair: Pair, dtype: torch.dtype, device: str, max_memory: MaxMemory | None = None
    ) -> None:
        self.pair, self.dtype, self.device, self.max_memory = pair, dtype, device, max_memory
        self.position: float | None = None
        #: writes the present numbers of a tensor
        self._write: Callable[[str, torch.Tensor], object] | None = None
        self.size: Counter[str] = Counter()
        self.fetched = 0
        #: what is not on the device, None where it is in the checkpoints only
        self._elsewhere: dict[str, torch.Tensor | None] = {}
        self.model = skeleton(pair.base.config)
        #: alike for lengths that may be in one batch
        self.side = RopeBorders.of(pair.base.config).side
        if dtype == torch.float64 and hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # grouped products stop at float32
        places = self._places()
        weights = {
            name: self._weight(name, shape, places.get(name, device))
            for name, shape in pair.partition.shapes.items()
        }
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        self.model.requires_grad_(False)
        for module in self.model.modules():  # weights are there already
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        fetch_when_called(self.model)

    def _places(self) -> dict[str, str]:
        if self.max_memory is None:
            return {}
        dims = Dims.from_config(self.pair.base.config)
        dims.require_map(option("device_map"))
        layer = type(self.model.get_submodule(f"{dims.architecture.layers}.0"))
        return placement(self.model, layer, self.dtype, self.device, self.max_memory)

    def _weight(self, name: str, shape: tuple[int, ...], place: str) -> torch.Tensor:
        self.size[place] += math.prod(shape) * self.dtype.itemsize
        if place == self.device:
            return torch.empty(shape, dtype=self.dtype, device=place)
        kept = None if place == DISK else torch.empty(shape, dtype=self.dtype, device=place)
        self._elsewhere[name] = kept
        return Offloaded.of(shape, self.dtype, partial(self._fetch, name, shape), self.device)

    @torch.no_grad()
    def _fetch(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kept = self._elsewhere[name]
        if kept is not None:
            found = kept.to(self.device)
        else:
            assert self._write is not None
            found = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._write(name, found)
        self.fetched += found.nbytes
        return found

    @property
    def offloaded(self) -> bool:
        """Whether some weights are kept elsewhere than on the device."""
        return bool(self._elsewhere)

    def _read(self, position: float, name: str, out: torch.Tensor) -> None:
        if position == 1.0:
            self.pair.expert.read(name, out)
        elif position == 0.0 or name not in self.pair.changed:
            self.pair.base.read(name, out)
        else:
            self.pair.between(name, position, out)

    def move_to(self, position: float) -> None:
        """Set the weights to base + position * (expert - base); 0 and 1 are the checkpoints."""
        if position != self.position:
            self.fill(partial(self._read, position))
            self.position = position

    def release(self) -> None:
        """Give back the memory of the weights, for good: other processes hold the model now."""
        torch.nn.Module.to(self.model, "meta")
        self._elsewhere = dict.fromkeys(self._elsewhere)
        self.position = self._write = None

    @torch.no_grad()
    def fill(self, write: Callable[[str, torch.Tensor], object]) -> None:
        """Have every weight overwritten, by its name.

        Args:
            write: writes a tensor of the name's numbers, the same each time: what is kept nowhere
                is written anew whenever it is fetched.
        """
        self.position, self._write = None, write
        for name, parameter in self.model.named_parameters():
            out = self._elsewhere.get(name, parameter)
            if out is not None:
                write(name, out)

    @property
    def where(self) -> str:
        """Its weights' size, and the places where they are kept if there are several."""
        if self.max_memory is None:
            return in_gib(self.size.total())
        return ", ".join(f"{in_gib(size)} on {place}" for place, size in self.size.items())
