"""Record one forward pass, then replay only the layers that follow a patch.

The frameworks of this field run one full forward per patch. Here every decoder layer's input and
keyword arguments are recorded once; a patch in layer l changes that layer's output, and only
layers l+1... run again, with many patches in one batch. The layers are the model's own modules,
so its attention, masks and rotary embedding stay right without our writing any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.architectures import Architecture
from mergekit_wp.components import Dims
from mergekit_wp.criteria import (
    Targets,
    anchor_values,
    kl_values,
    logprob_values,
    wide,
)
from mergekit_wp.engine.inside import Ended, Entered, under
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.scorefile import CriterionName


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that a sweep touches, found by its architecture's declaration.

    Raises:
        UserError: the architecture has no component map.
    """

    model: Any

    @cached_property
    def architecture(self) -> Architecture:
        """Where everything is."""
        return Dims.from_config(self.model.config).architecture

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
    def embedding(self) -> nn.Module:
        """Token embedding."""
        module: nn.Module = self.model.get_submodule(self.architecture.embedding)
        return module

    @property
    def entrances(self) -> list[nn.Module]:
        """Embeddings whose outputs make the input of the first layer."""
        paths = (self.architecture.embedding, self.architecture.positions)
        return [self.model.get_submodule(path) for path in paths if path is not None]

    @property
    def norm(self) -> nn.Module:
        """Norm after the last layer."""
        module: nn.Module = self.model.get_submodule(self.architecture.norm)
        return module

    @property
    def head(self) -> nn.Module:
        """Unembedding."""
        module: nn.Module = self.model.get_submodule(self.architecture.head)
        return module

    def attention(self, index: int) -> nn.Module:
        """Attention block of a layer."""
        module: nn.Module = self.layers[index].get_submodule(self.architecture.attention)
        return module

    def mlp(self, index: int) -> nn.Module:
        """MLP block of a layer."""
        module: nn.Module = self.layers[index].get_submodule(self.architecture.mlp)
        return module

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

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

    @property
    def tied(self) -> bool:
        """Whether unembedding and embedding are one tensor."""
        return self.head.weight is self.embedding.weight


@dataclass
class LayerCall:
    """What one decoder layer was called with, and what its two blocks returned."""

    hidden: torch.Tensor
    kwargs: dict[str, Any]
    attention: torch.Tensor = field(init=False)
    mlp: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)


@dataclass
class Trace:
    """One recorded forward pass over a batch of prompts.

    ``logits`` are those that predict the response, ``[P, vocabulary]``, where they cannot be had
    from the residual stream: the architecture has no map.
    """

    batch: PromptBatch
    calls: list[LayerCall]
    logits: torch.Tensor | None = None

    def residual(self, after_layer: int) -> torch.Tensor:
        """Residual stream ``[rows, T, hidden]`` after a layer."""
        return self.calls[after_layer].output


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


def record(decoder: Decoder, batch: PromptBatch) -> Trace:
    """Run the decoder once (no unembedding) and keep every layer's call."""
    if not decoder.architecture.mapped:
        return record_whole(decoder, batch, {})
    calls: list[LayerCall] = []
    handles: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*signature(module.forward).parameters][: len(args)]
        hidden, *rest = args
        calls.append(LayerCall(hidden, {**dict(zip(names[1:], rest, strict=True)), **kwargs}))

    def keep(slot: str) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            setattr(calls[-1], slot, first(output))

        return after

    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep("output")))
        handles.append(decoder.attention(index).register_forward_hook(keep("attention")))
        handles.append(decoder.mlp(index).register_forward_hook(keep("mlp")))
    with hooked(handles):
        decoder.model.base_model(input_ids=batch.ids, use_cache=False, **batch.arguments)
    return Trace(batch, calls)


def record_whole(
    decoder: Decoder, batch: PromptBatch, swapped: Mapping[str, torch.Tensor]
) -> Trace:
    """Run the whole model, with some other weights, and keep what its layers return."""
    calls: list[LayerCall] = []

    def after(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(LayerCall(args[0] if args else first(output), {}))
        calls[-1].output = first(output)

    inputs = {"input_ids": batch.ids, "use_cache": False}
    with hooked([layer.register_forward_hook(after) for layer in decoder.layers]):
        found = functional_call(decoder.model, dict(swapped), (), inputs)
    return Trace(batch, calls, found.logits[batch.rows, batch.cols])


def _repeat(value: Any, n: int, copies: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == n > 1:
        return value.repeat(copies, *[1] * (value.dim() - 1))
    if isinstance(value, tuple):
        return tuple(_repeat(v, n, copies) for v in value)
    return value


def repeated_kwargs(call: LayerCall, n: int, copies: int) -> dict[str, Any]:
    """A layer's keyword arguments for `copies` patches of a batch of `n` rows."""
    return {key: _repeat(value, n, copies) for key, value in call.kwargs.items()}


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


def layer_output(
    decoder: Decoder,
    index: int,
    trace: Trace,
    *,
    attention: torch.Tensor | None = None,
    mlp: torch.Tensor | None = None,
    swapped: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Output of one layer under patches, ``[C, rows, T, hidden]``.

    Args:
        decoder: the receiving model.
        index: which layer.
        trace: its recorded run.
        attention: attention block outputs to use instead, ``[C, rows, T, hidden]``.
        mlp: MLP block outputs to use instead, ``[C, rows, T, hidden]``.
        swapped: weights of this layer to use instead, by name within the layer (C is then 1).
    """
    call, layer = trace.calls[index], decoder.layers[index]
    given = attention if attention is not None else mlp
    copies = 1 if given is None else given.shape[0]
    n = trace.batch.n_rows
    hidden = call.hidden.repeat(copies, 1, 1)
    with ExitStack() as stack:
        if attention is not None:
            stack.enter_context(
                returning(decoder.attention(index), attention.flatten(0, 1), as_tuple=True)
            )
        if mlp is not None:
            stack.enter_context(returning(decoder.mlp(index), mlp.flatten(0, 1), as_tuple=False))
        kwargs = repeated_kwargs(call, n, copies)
        output = first(functional_call(layer, dict(swapped or {}), (hidden,), kwargs))
    unflat: torch.Tensor = output.unflatten(0, (copies, n))
    return unflat


Criteria = tuple[CriterionName, ...]


def replay(
    decoder: Decoder,
    trace: Trace,
    hidden: torch.Tensor,
    after_layer: int,
    criteria: Criteria,
    targets: Targets,
    head_weights: Mapping[str, torch.Tensor] | None = None,
) -> dict[CriterionName, torch.Tensor]:
    """Run the layers after a patch and read the criteria.

    Args:
        decoder: the receiving model.
        trace: its recorded run.
        hidden: changed residual stream after layer `after_layer`, ``[C, rows, T, hidden]``;
            layer -1 is the embedding.
        after_layer: where the change is.
        criteria: which criteria to read.
        targets: what they are measured against.
        head_weights: swapped weights of the final norm or unembedding.

    Returns:
        Values ``[C, n]`` per criterion. Layers past the last one that matters do not run.
    """
    copies, n = hidden.shape[:2]
    last = last_layer(decoder, criteria, targets)
    anchor = targets.anchor
    values: dict[CriterionName, torch.Tensor] = {}
    if "anchor" in criteria:
        assert anchor is not None
        if after_layer > anchor.layer:  # the patch lies above the anchor
            own = anchor_values(trace.residual(anchor.layer), trace.batch, anchor.vector)
            values["anchor"] = own.expand(copies, -1)
        elif after_layer == anchor.layer:
            values["anchor"] = anchor_values(hidden, trace.batch, anchor.vector)
    flat = hidden.flatten(0, 1)
    outputs: Criteria = tuple(c for c in criteria if c != "anchor")
    batch = trace.batch
    final: torch.Tensor | None = None  # residual stream at the positions that are read
    for index in range(after_layer + 1, last + 1):
        call = trace.calls[index]
        at_anchor = "anchor" in criteria and anchor is not None and index == anchor.layer
        if index == last and not (at_anchor and outputs) and not decoder.parallel:
            places = (batch.rows, batch.cols) if outputs else (batch.last_rows, batch.last)
            final = _at_places(decoder, index, call, flat.unflatten(0, (copies, n)), places)
            continue
        flat = first(decoder.layers[index](flat, **repeated_kwargs(call, n, copies)))
        if at_anchor:
            assert anchor is not None
            whole = flat.unflatten(0, (copies, n))
            values["anchor"] = anchor_values(whole, batch, anchor.vector)
    if outputs:
        if final is None:
            final = flat.unflatten(0, (copies, n))[:, batch.rows, batch.cols]
        values |= output_values(decoder, final, batch, outputs, targets, head_weights)
    elif final is not None:
        assert anchor is not None
        values["anchor"] = wide(final) @ anchor.vector
    return values


def _at_places(
    decoder: Decoder,
    index: int,
    call: LayerCall,
    hidden: torch.Tensor,
    places: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """A layer's output at some places of a batch: its MLP runs nowhere else.

    Args:
        decoder: a model whose MLPs read what attention wrote.
        index: the layer.
        call: its recorded call.
        hidden: what enters it, ``[C, rows, T, hidden]``.
        places: rows and columns, ``[P]`` each.

    Returns:
        ``[C, P, hidden]``.
    """
    copies, n = hidden.shape[:2]
    layer, nothing = decoder.layers[index], hidden.new_zeros(hidden.shape[-1])
    with returning(decoder.mlp(index), nothing, as_tuple=False):
        attended = first(layer(hidden.flatten(0, 1), **repeated_kwargs(call, n, copies)))
    there = attended.unflatten(0, (copies, n))[:, *places]
    with returning(decoder.attention(index), nothing, as_tuple=True):
        return first(layer(there, **call.kwargs))


def output_values(
    decoder: Decoder,
    final: torch.Tensor,
    batch: PromptBatch,
    criteria: Criteria,
    targets: Targets,
    head_weights: Mapping[str, torch.Tensor] | None = None,
) -> dict[CriterionName, torch.Tensor]:
    """Values of the output criteria from final hidden states ``[..., P, hidden]``."""
    return logit_values(decoder.logits(final, head_weights), batch, criteria, targets)


def logit_values(
    logits: torch.Tensor, batch: PromptBatch, criteria: Criteria, targets: Targets
) -> dict[CriterionName, torch.Tensor]:
    """Values of the output criteria among `criteria` from logits ``[..., P, vocabulary]``."""
    values: dict[CriterionName, torch.Tensor] = {}
    if "kl" in criteria:
        values["kl"] = kl_values(logits, batch, targets)
    if "logprob" in criteria:
        values["logprob"] = logprob_values(logits, batch)
    return values


def last_layer(decoder: Decoder, criteria: Criteria, targets: Targets) -> int:
    """The last layer whose output any of the criteria depends on."""
    if any(c != "anchor" for c in criteria):
        return len(decoder.layers) - 1
    assert targets.anchor is not None
    return targets.anchor.layer


def own_values(
    decoder: Decoder, trace: Trace, criteria: Criteria, targets: Targets
) -> dict[CriterionName, torch.Tensor]:
    """Values ``[n]`` of the recorded run itself."""
    if trace.logits is not None:
        values = logit_values(trace.logits, trace.batch, criteria, targets)
        if "anchor" in criteria and (anchor := targets.anchor) is not None:
            hidden = trace.residual(anchor.layer)
            values["anchor"] = anchor_values(hidden, trace.batch, anchor.vector)
        return values
    last = len(decoder.layers) - 1
    hidden = trace.residual(last).unsqueeze(0)
    return {
        name: value[0]
        for name, value in replay(decoder, trace, hidden, last, criteria, targets).items()
    }
