"""Weights that are kept elsewhere, and fetched while a module computes with them.

accelerate's own hooks write a module's weights before every call, over the ones that a swap has
just put there, and replace `forward`, which a replay does too. So the hooks are ours: they fetch
what is not there, and leave what is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class Offloaded(nn.Parameter):
    """A weight without numbers: shape and dtype are the model's, its device is ``meta``.

    Attributes:
        fetch: makes a tensor of its present numbers on the device that computes.
        computes_on: that device.
    """

    fetch: Callable[[], torch.Tensor]
    computes_on: torch.device

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        fetch: Callable[[], torch.Tensor],
        device: str,
    ) -> Offloaded:
        """A weight of a shape and dtype, fetched to a device."""
        weight = cls(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        weight.fetch, weight.computes_on = fetch, torch.device(device)
        return weight


def here(weight: torch.Tensor) -> torch.Tensor:
    """A weight to compute with: itself, or what is fetched for it."""
    return weight.fetch() if isinstance(weight, Offloaded) else weight


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, wherever its weights are kept."""
    weight = next(model.parameters())
    return weight.computes_on if isinstance(weight, Offloaded) else weight.device


def fetch_when_called(model: nn.Module) -> None:
    """Let every module that owns offloaded weights fetch them for each of its calls.

    Weights that are exchanged for the time of a call, as `torch.func.functional_call` does, are
    used as they are, and nothing is fetched for them.
    """
    for module in model.modules():
        if any(isinstance(weight, Offloaded) for weight in module.parameters(recurse=False)):
            visit = _Visit()
            module.register_forward_pre_hook(visit.begin)
            module.register_forward_hook(visit.end, always_call=True)


@contextmanager
def brought(*modules: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Have the offloaded weights of some modules there for several calls, each fetched once.

    Yields:
        What stands in each one's place: a leaf, whose gradient can be asked for.
    """
    there: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (module, name, weight)
        for whole in modules
        for module in whole.modules()
        for name, weight in module._parameters.items()
        if isinstance(weight, Offloaded)
    ]
    try:
        for module, name, weight in places:
            if weight not in there:
                there[weight] = nn.Parameter(weight.fetch(), requires_grad=False)
            module._parameters[name] = there[weight]
        yield there
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


@dataclass(frozen=True)
class _Kept:
    """What autograd keeps of an offloaded weight: how to look at it once it is fetched again."""

    weight: Offloaded
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Visit:
    """The weights that a module has for the time of a call, with those whose places they take."""

    fetched: dict[str, tuple[Offloaded, torch.Tensor]] = field(default_factory=dict)
    saving: saved_tensors_hooks | None = None

    def begin(self, module: nn.Module, _args: Any) -> None:
        """Before the call."""
        self.fetched = {
            name: (weight, weight.fetch())
            for name, weight in module._parameters.items()
            if isinstance(weight, Offloaded)
        }
        for name, (_, tensor) in self.fetched.items():
            module._parameters[name] = tensor  # type: ignore[assignment]
        if self.fetched and torch.is_grad_enabled():
            self.saving = saved_tensors_hooks(self._pack, _unpack)
            self.saving.__enter__()

    def end(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """After it, also where it failed."""
        if self.saving is not None:
            self.saving.__exit__()
        for name, (weight, _) in self.fetched.items():
            module._parameters[name] = weight
        self.fetched, self.saving = {}, None

    def _pack(self, saved: torch.Tensor) -> torch.Tensor | _Kept:
        """Without this the graph would hold all weights until its backward pass."""
        place = saved.untyped_storage().data_ptr()
        for weight, tensor in self.fetched.values():
            if tensor.untyped_storage().data_ptr() == place:
                return _Kept(weight, saved.size(), saved.stride(), int(saved.storage_offset()))
        return saved.detach()


def _unpack(kept: torch.Tensor | _Kept) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    return kept.weight.fetch().as_strided(kept.size, kept.stride, kept.offset)
