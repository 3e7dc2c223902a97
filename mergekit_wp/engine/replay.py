"""Record one forward pass, then replay only the layers that follow a patch.

The frameworks of this field run one full forward per patch. Here every decoder layer's input and
keyword arguments are recorded once; a patch in layer l changes that layer's output, and only
layers l+1... run again, with many patches in one batch. The layers are the model's own modules,
so its attention, masks and rotary embedding stay right without our writing any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.criteria import Criteria, Targets, anchor_values, logit_values, wide
from mergekit_wp.engine.decoder import Decoder, first, hooked, returning
from mergekit_wp.engine.writers import Writer
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CriterionName, FineKind

#: values by criterion: ``[C, n]`` of C patches, or ``[n]`` of one run
Values = dict[CriterionName, torch.Tensor]


@dataclass
class LayerCall:
    """What one decoder layer was called with, and what its two blocks returned.

    Of a run that was recorded for it, ``read`` is what output projections were handed,
    ``[rows, T, width]`` by the names of their weights within the layer.
    """

    hidden: torch.Tensor
    kwargs: dict[str, Any]
    attention: torch.Tensor = field(init=False)
    mlp: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)
    read: dict[str, torch.Tensor] = field(init=False, default_factory=dict)


@dataclass
class Recording:
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


def record(decoder: Decoder, batch: PromptBatch, kinds: Sequence[FineKind] = ()) -> Recording:
    """Run the decoder once (no unembedding) and keep every layer's call.

    Args:
        decoder: the model.
        batch: the prompts.
        kinds: of component whose output projections' inputs are kept as well.
    """
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

    def keep_read(writer: Writer) -> Any:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            with torch.no_grad():
                read = writer.read(args).detach()
            calls[-1].read[writer.name] = read.view(*calls[-1].hidden.shape[:2], -1)

        return before

    for index, layer in enumerate(decoder.layers):
        writers = {w.name: w for w in (Writer.of(decoder, index, kind) for kind in kinds)}
        for writer in writers.values():
            handles.append(writer.module.register_forward_pre_hook(keep_read(writer)))
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep("output")))
        handles.append(decoder.attention(index).register_forward_hook(keep("attention")))
        handles.append(decoder.mlp(index).register_forward_hook(keep("mlp")))
    with hooked(handles):
        decoder.model.base_model(input_ids=batch.ids, use_cache=False, **batch.arguments)
    return Recording(batch, calls)


def record_whole(
    decoder: Decoder, batch: PromptBatch, swapped: Mapping[str, torch.Tensor]
) -> Recording:
    """Run the whole model, with some other weights, and keep what its layers return."""
    calls: list[LayerCall] = []

    def after(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(LayerCall(args[0] if args else first(output), {}))
        calls[-1].output = first(output)

    inputs = {"input_ids": batch.ids, "use_cache": False}
    with hooked([layer.register_forward_hook(after) for layer in decoder.layers]):
        found = functional_call(decoder.model, dict(swapped), (), inputs)
    return Recording(batch, calls, found.logits[batch.rows, batch.cols])


def _repeat(value: Any, n: int, copies: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == n > 1:
        return value.repeat(copies, *[1] * (value.dim() - 1))
    if isinstance(value, tuple):
        return tuple(_repeat(v, n, copies) for v in value)
    return value


def repeated_kwargs(call: LayerCall, n: int, copies: int) -> dict[str, Any]:
    """A layer's keyword arguments for `copies` patches of a batch of `n` rows."""
    return {key: _repeat(value, n, copies) for key, value in call.kwargs.items()}


@dataclass(frozen=True)
class Receiver:
    """A model with its recorded run on some prompts, and what is read of it: patches go in here.

    Attributes:
        decoder: the model, at the weights that were recorded.
        recording: its run.
        criteria: which criteria to read.
        targets: what they are measured against.
        copies: patches per replay.
    """

    decoder: Decoder
    recording: Recording
    criteria: Criteria
    targets: Targets
    copies: int = 1

    @property
    def batch(self) -> PromptBatch:
        """The prompts."""
        return self.recording.batch

    @cached_property
    def own(self) -> Values:
        """Values ``[n]`` of the recorded run itself."""
        recording = self.recording
        if recording.logits is not None:
            values = logit_values(recording.logits, self.batch, self.criteria, self.targets)
            if "anchor" in self.criteria and (anchor := self.targets.anchor) is not None:
                hidden = recording.residual(anchor.layer)
                values["anchor"] = anchor_values(hidden, self.batch, anchor)
            return values
        last = len(self.decoder.layers) - 1
        hidden = recording.residual(last).unsqueeze(0)
        return {name: value[0] for name, value in self.replay(hidden, last).items()}

    def layer_output(
        self,
        index: int,
        *,
        attention: torch.Tensor | None = None,
        mlp: torch.Tensor | None = None,
        swapped: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Output of one layer under patches, ``[C, rows, T, hidden]``.

        Args:
            index: which layer.
            attention: attention block outputs to use instead, ``[C, rows, T, hidden]``.
            mlp: MLP block outputs to use instead, ``[C, rows, T, hidden]``.
            swapped: weights of this layer to use instead, by name within the layer (C is then 1).
        """
        call, decoder = self.recording.calls[index], self.decoder
        given = attention if attention is not None else mlp
        copies = 1 if given is None else given.shape[0]
        n = self.batch.n_rows
        hidden = call.hidden.repeat(copies, 1, 1)
        with ExitStack() as stack:
            if attention is not None:
                stack.enter_context(
                    returning(decoder.attention(index), attention.flatten(0, 1), as_tuple=True)
                )
            if mlp is not None:
                stack.enter_context(
                    returning(decoder.mlp(index), mlp.flatten(0, 1), as_tuple=False)
                )
            kwargs = repeated_kwargs(call, n, copies)
            output = first(
                functional_call(decoder.layers[index], dict(swapped or {}), (hidden,), kwargs)
            )
        unflat: torch.Tensor = output.unflatten(0, (copies, n))
        return unflat

    def replay(
        self,
        hidden: torch.Tensor,
        after_layer: int,
        head_weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Values:
        """Run the layers after a patch and read the criteria.

        Args:
            hidden: changed residual stream after layer `after_layer`, ``[C, rows, T, hidden]``;
                layer -1 is the embedding.
            after_layer: where the change is.
            head_weights: swapped weights of the final norm or unembedding.

        Returns:
            Values ``[C, n]`` per criterion. Layers past the last one that matters do not run.
        """
        decoder, batch, criteria = self.decoder, self.batch, self.criteria
        copies, n = hidden.shape[:2]
        last = last_layer(decoder, criteria, self.targets)
        anchor = self.targets.anchor if "anchor" in criteria else None
        values: Values = {}
        if anchor is not None and after_layer > anchor.layer:  # the patch lies above the anchor
            own = anchor_values(self.recording.residual(anchor.layer), batch, anchor)
            values["anchor"] = own.expand(copies, -1)
        elif anchor is not None and after_layer == anchor.layer:
            values["anchor"] = anchor_values(hidden, batch, anchor)
        flat = hidden.flatten(0, 1)
        outputs: Criteria = tuple(c for c in criteria if c != "anchor")
        final: torch.Tensor | None = None  # residual stream at the positions that are read
        for index in range(after_layer + 1, last + 1):
            call = self.recording.calls[index]
            at_anchor = anchor is not None and index == anchor.layer
            if index == last and not (at_anchor and outputs) and not decoder.parallel:
                places = (batch.rows, batch.cols) if outputs else (batch.last_rows, batch.last)
                final = self._at_places(index, flat.unflatten(0, (copies, n)), places)
                continue
            flat = first(decoder.layers[index](flat, **repeated_kwargs(call, n, copies)))
            if anchor is not None and at_anchor:
                whole = flat.unflatten(0, (copies, n))
                values["anchor"] = anchor_values(whole, batch, anchor)
        if outputs:
            if final is None:
                final = flat.unflatten(0, (copies, n))[:, batch.rows, batch.cols]
            logits = decoder.logits(final, head_weights)
            values |= logit_values(logits, batch, outputs, self.targets)
        elif final is not None:
            assert anchor is not None
            values["anchor"] = wide(final) @ anchor.vector
        return values

    def _at_places(
        self, index: int, hidden: torch.Tensor, places: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """A layer's output at some places of the batch: its MLP runs nowhere else.

        Args:
            index: the layer, of a model whose MLPs read what attention wrote.
            hidden: what enters it, ``[C, rows, T, hidden]``.
            places: rows and columns, ``[P]`` each.

        Returns:
            ``[C, P, hidden]``.
        """
        copies, n = hidden.shape[:2]
        decoder, call = self.decoder, self.recording.calls[index]
        layer, nothing = decoder.layers[index], hidden.new_zeros(hidden.shape[-1])
        with returning(decoder.mlp(index), nothing, as_tuple=False):
            attended = first(layer(hidden.flatten(0, 1), **repeated_kwargs(call, n, copies)))
        there = attended.unflatten(0, (copies, n))[:, *places]
        with returning(decoder.attention(index), nothing, as_tuple=True):
            return first(layer(there, **call.kwargs))


def last_layer(decoder: Decoder, criteria: Criteria, targets: Targets) -> int:
    """The last layer whose output any of the criteria depends on."""
    if any(c != "anchor" for c in criteria):
        return len(decoder.layers) - 1
    assert targets.anchor is not None
    return targets.anchor.layer
