"""The parts of a model that the engine touches, and how it is run from or up to one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from mergekit_wp.architectures import Architecture, Dims
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import PromptBatch


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that a sweep touches, found by its architecture's declaration.

    Raises:
        UserError: the architecture has no component map.
    """

    model: PreTrainedModel

    @cached_property
    def dims(self) -> Dims:
        """Component counts."""
        return Dims.from_config(self.model.config)

    @property
    def architecture(self) -> Architecture:
        """Where everything is."""
        return self.dims.architecture

    @cached_property
    def layers(self) -> Any:
        """Decoder layers.

        Raises:
            UserError: an architecture without a map, and no list of modules has their number.
        """
        if self.architecture.mapped:
            return self.model.get_submodule(self.architecture.layers)
        number = int(self.model.config.num_hidden_layers)
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == number:
                return module
        raise UserError(f"'{self.model.config.model_type}' has no list of {number} decoder layers")

    @property
    def entrances(self) -> list[nn.Module]:
        """Embeddings whose outputs make the input of the first layer."""
        paths = (self.architecture.embedding, self.architecture.positions)
        return [self.model.get_submodule(path) for path in paths if path is not None]

    @property
    def norm(self) -> nn.Module:
        """Norm after the last layer; what changes nothing where there is none."""
        path = self.architecture.norm
        return nn.Identity() if path is None else self.model.get_submodule(path)

    @property
    def head(self) -> nn.Module:
        """Unembedding."""
        return self.model.get_submodule(self.architecture.head)

    def attention(self, index: int) -> nn.Module:
        """Attention block of a layer."""
        module: nn.Module = self.layers[index].get_submodule(self.architecture.attention)
        return module

    def mlp(self, index: int) -> nn.Module:
        """MLP block of a layer."""
        module: nn.Module = self.layers[index].get_submodule(self.architecture.mlp)
        return module

    def entering(
        self, batch: PromptBatch, swapped: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What enters the first layer, ``[rows, T, hidden]``: the model runs that far.

        Args:
            batch: the prompts.
            swapped: weights to use instead of the model's, by tensor name.
        """

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Entered(args[0] if args else kwargs["hidden_states"])

        inputs = {"input_ids": batch.ids, "use_cache": False, **batch.arguments}
        with hooked([self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)]):
            try:
                functional_call(self.model, dict(swapped or {}), (), inputs)
            except Entered as entered:
                return entered.hidden
        raise AssertionError("the model has not called its first layer")

    def logits(
        self, at_positions: torch.Tensor, swapped: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Final norm and unembedding of hidden states, ``[..., hidden]`` to ``[..., vocabulary]``.

        What the model does to its logits besides (scale them, cap them) its own forward does.

        Args:
            at_positions: residual stream after the last layer.
            swapped: weights to use instead of the model's, by tensor name.
        """
        swapped = dict(swapped or {})
        norm = under(swapped, f"{self.architecture.norm}.")
        normed: torch.Tensor = functional_call(self.norm, norm, (at_positions,))
        flat = Ended(normed.flatten(0, -2).unsqueeze(0))
        nothing = torch.zeros((1, 1), dtype=torch.long, device=normed.device)
        with _instead(self.model.base_model, lambda *_args, **_kwargs: flat):
            if swapped:
                found = functional_call(self.model, swapped, (nothing,), {"use_cache": False})
            else:  # looks up no names
                found = self.model(nothing, use_cache=False)
        logits: torch.Tensor = found.logits
        return logits.view(*normed.shape[:-1], -1)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same input."""
        return self.architecture.parallel(self.model.config)


def first(output: Any) -> torch.Tensor:
    """A module's output without what some return beside it."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks on the way out, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def returning(module: nn.Module, value: Any, *, as_tuple: bool) -> Iterator[None]:
    """Make a block return a given value instead of computing."""
    with _instead(module, lambda *_args, **_kwargs: (value, None) if as_tuple else value):
        yield


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class Ended:
    """What a model's decoder returns, whatever its model asks for besides the hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]


class Entered(Exception):
    """Carries what enters the first layer out of the model."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
