"""Record one forward pass, then replay only the layers that follow a patch (DESIGN section 3).

The frameworks of this field run one full forward per patch. Here every decoder layer's input and
keyword arguments are recorded once; a patch in layer l changes that layer's output, and only
layers l+1... run again, with many patches in one batch. The layers are the model's own modules,
so its attention, masks and rotary embedding stay right without our writing any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.criteria import (
    Targets,
    anchor_values,
    kl_values,
    logprob_values,
)
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.scorefile import CriterionName


@dataclass(frozen=True)
class Decoder:
    """The parts of a Llama-family model that a sweep touches."""

    model: Any

    @property
    def layers(self) -> Any:
        """Decoder layers."""
        return self.model.model.layers

    @property
    def embedding(self) -> nn.Module:
        """Token embedding."""
        module: nn.Module = self.model.model.embed_tokens
        return module

    @property
    def norm(self) -> nn.Module:
        """Norm after the last layer."""
        module: nn.Module = self.model.model.norm
        return module

    @property
    def head(self) -> nn.Module:
        """Unembedding."""
        module: nn.Module = self.model.lm_head
        return module

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def logits(
        self, at_positions: torch.Tensor, swapped: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Final norm and unembedding of hidden states, ``[..., hidden]`` to ``[..., vocabulary]``.

        Args:
            at_positions: residual stream after the last layer.
            swapped: weights to use instead of the model's, by tensor name.
        """
        swapped = swapped or {}
        norm = _under(swapped, "model.norm.")
        head = _under(swapped, "lm_head.")
        if self.tied and "model.embed_tokens.weight" in swapped:
            head = {"weight": swapped["model.embed_tokens.weight"]}
        normed = functional_call(self.norm, norm, (at_positions,))
        logits: torch.Tensor = functional_call(self.head, head, (normed,))
        return logits

    @property
    def tied(self) -> bool:
        """Whether unembedding and embedding are one tensor."""
        return self.head.weight is self.embedding.weight


def _under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


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
    """One recorded forward pass over a batch of prompts."""

    batch: PromptBatch
    calls: list[LayerCall]

    def residual(self, after_layer: int) -> torch.Tensor:
        """Residual stream ``[n, T, hidden]`` after a layer."""
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
    calls: list[LayerCall] = []
    handles: list[Any] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args[0], kwargs))

    def keep(slot: str) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            setattr(calls[-1], slot, first(output))

        return after

    for layer in decoder.layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep("output")))
        handles.append(layer.self_attn.register_forward_hook(keep("attention")))
        handles.append(layer.mlp.register_forward_hook(keep("mlp")))
    with hooked(handles):
        decoder.model.model(input_ids=batch.ids, use_cache=False)
    return Trace(batch, calls)


def _repeat(value: Any, n: int, copies: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == n > 1:
        return value.repeat(copies, *[1] * (value.dim() - 1))
    if isinstance(value, tuple):
        return tuple(_repeat(v, n, copies) for v in value)
    return value


def repeated_kwargs(call: LayerCall, n: int, copies: int) -> dict[str, Any]:
    """A layer's keyword arguments for `copies` patches of an `n`-prompt batch."""
    return {key: _repeat(value, n, copies) for key, value in call.kwargs.items()}


@contextmanager
def returning(module: nn.Module, value: torch.Tensor, *, as_tuple: bool) -> Iterator[None]:
    """Make a block return a given value instead of computing."""
    module.forward = lambda *_args, **_kwargs: (value, None) if as_tuple else value
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
    """Output of one layer under patches, ``[C, n, T, hidden]``.

    Args:
        decoder: the receiving model.
        index: which layer.
        trace: its recorded run.
        attention: attention block outputs to use instead, ``[C, n, T, hidden]``.
        mlp: MLP block outputs to use instead, ``[C, n, T, hidden]``.
        swapped: weights of this layer to use instead, by name within the layer (C is then 1).
    """
    call, layer = trace.calls[index], decoder.layers[index]
    given = attention if attention is not None else mlp
    copies = 1 if given is None else given.shape[0]
    n = trace.batch.size
    hidden = call.hidden.repeat(copies, 1, 1)
    with ExitStack() as stack:
        if attention is not None:
            stack.enter_context(returning(layer.self_attn, attention.flatten(0, 1), as_tuple=True))
        if mlp is not None:
            stack.enter_context(returning(layer.mlp, mlp.flatten(0, 1), as_tuple=False))
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
        hidden: changed residual stream after layer `after_layer`, ``[C, n, T, hidden]``;
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
            values["anchor"] = own.expand(copies, n)
        elif after_layer == anchor.layer:
            values["anchor"] = anchor_values(hidden, trace.batch, anchor.vector)
    flat = hidden.flatten(0, 1)
    for index in range(after_layer + 1, last + 1):
        kwargs = repeated_kwargs(trace.calls[index], n, copies)
        flat = first(decoder.layers[index](flat, **kwargs))
        if "anchor" in criteria and anchor is not None and index == anchor.layer:
            at_anchor = flat.unflatten(0, (copies, n))
            values["anchor"] = anchor_values(at_anchor, trace.batch, anchor.vector)
    outputs: Criteria = tuple(c for c in criteria if c != "anchor")
    if outputs:
        final = flat.unflatten(0, (copies, n))[:, trace.batch.rows, trace.batch.cols]
        values |= output_values(decoder, final, trace.batch, outputs, targets, head_weights)
    return values


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
    last = len(decoder.layers) - 1
    hidden = trace.residual(last).unsqueeze(0)
    return {
        name: value[0]
        for name, value in replay(decoder, trace, hidden, last, criteria, targets).items()
    }
