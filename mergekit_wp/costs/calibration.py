"""How fast this machine does each kind of work: one layer, one unembedding, one read, timed.

The layer is the model's own module with its own weights, at the rows and tokens that the command
will run. Nothing of this is kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_wp.architectures import text_config
from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.costs.passes import TextBatch, attended, layer_flops
from mergekit_wp.costs.work import Work
from mergekit_wp.engine.decoder import Decoder, first, hooked
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.refusals import width

#: seconds that it may take, and the part of the work that it may take
LONGEST, SHARE = 10.0, 0.02
#: runs of each kind, of which the quickest counts; positions of the unembedding, rows of an answer
_RUNS, _POSITIONS, _ROWS = 3, 64, 32
#: bytes of a file, where nothing else is known of it
_READ = 2**26


@dataclass(frozen=True)
class Speeds:
    """Of each kind of work, in its own unit a second; ``step`` is seconds of one step of answers.

    ``written`` is taken to be as ``read``: writing is not tried out.
    """

    forward: float
    backward: float
    head: float
    step: float
    read: float
    passed: float

    def seconds(self, work: Work) -> float:
        """What some work takes."""
        return (
            work.forward / self.forward
            + work.backward / self.backward
            + work.head / self.head
            + work.steps * self.step
            + (work.read + work.written) / self.read
            + work.passed / self.passed
        )


@dataclass(frozen=True)
class Timed:
    """What is timed.

    Attributes:
        checkpoint: the model.
        size: of it.
        dtype: of weights and activations.
        device: that computes.
        batch: rows and tokens as the command runs them.
        rows: that answer together.
    """

    checkpoint: Checkpoint
    size: ModelSize
    dtype: torch.dtype
    device: str
    batch: TextBatch
    rows: int = _ROWS


def roughly(layers: int, work: Work, device: str) -> float:
    """Seconds that some work takes at least, by speeds that few machines reach."""
    cores = torch.get_num_threads()
    flops = 4e14 if torch.device(device).type == "cuda" else 6e10 * cores
    steps = work.steps * layers * 1e-4
    return work.flops / flops + (work.read + work.written) / 3e9 + work.passed / 4e9 + steps


def calibrate(timed: Timed, budget: float = LONGEST) -> Speeds:
    """Time one of each.

    Args:
        timed: what is timed.
        budget: seconds that it may take, about.
    """
    clock = _Clock(budget, timed.device)
    size = timed.size
    model, layer = _one_layer(timed)
    read, passed = _reading(timed, model, layer, clock)
    rows = max(1, round(timed.batch.rows))
    batch = TextBatch(rows, max(1, round(timed.batch.width)), 0)
    hidden, kwargs = _called(model, layer, timed, batch)
    with torch.no_grad():
        ahead = clock.quickest(lambda: layer(hidden, **kwargs))
    weights = [p for p in layer.parameters() if p.is_floating_point()]
    both = clock.quickest(lambda: _back(layer, hidden, kwargs, weights))
    # weights' gradients as well as inputs': every product twice, attention's two and a half times
    back = 4.0 * batch.tokens * size.active + 2.5 * attended(size, batch)
    flops = layer_flops(size, batch)
    token, more = _called(model, layer, timed, TextBatch(timed.rows, 1, 0))
    with torch.no_grad():
        one = clock.quickest(lambda: layer(token, **more))
        head = _unembedding(timed, timed.rows)
        last = clock.quickest(lambda: head(gradient=False))
    unembedding = _unembedding(timed, _POSITIONS)
    reading = clock.quickest(lambda: unembedding(gradient=True))
    return Speeds(
        forward=flops / ahead,
        backward=back / max(both - ahead, 0.2 * ahead),
        head=4.0 * _POSITIONS * size.head / reading,
        step=size.layers * one + last,
        read=read,
        passed=passed,
    )


def of_reading(path: Path, budget: float = LONGEST) -> Speeds:
    """The speeds of what only reads and mixes.

    Args:
        path: a file that is read.
        budget: seconds that it may take, about.
    """
    clock, size = _Clock(budget, "cpu"), min(path.stat().st_size, _READ)

    def read() -> None:
        with open(path, "rb", buffering=0) as handle:
            handle.read(size)

    one = torch.zeros(max(1, size // 4))
    mixing = clock.quickest(lambda: torch.lerp(one, one, 0.5))
    never = float("inf")
    return Speeds(never, never, never, 0.0, size / clock.quickest(read), len(one) / mixing)


class _Clock:
    """Times calls, once where there is no time for more.

    Args:
        budget: seconds for all of them.
        device: that is waited for.
    """

    def __init__(self, budget: float, device: str) -> None:
        self.end, self.device = time.perf_counter() + budget, device

    def quickest(self, call: Callable[[], object]) -> float:
        """Seconds of the quickest of a few calls, the first of which warms up."""
        found = []
        for _ in range(1 + _RUNS):
            self._wait()
            begun = time.perf_counter()
            call()
            self._wait()
            found.append(max(time.perf_counter() - begun, 1e-7))
            if time.perf_counter() > self.end:
                break
        return min(found)

    def _wait(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


def _reading(timed: Timed, model: Any, layer: nn.Module, clock: _Clock) -> tuple[float, float]:
    """Bytes read a second, and numbers gone through a second: of the layer's largest tensor."""
    inside = {id(weight) for weight in layer.parameters()}
    names = [name for name, weight in model.named_parameters() if id(weight) in inside]
    name = max(names, key=lambda name: math.prod(timed.checkpoint.header(name)[0]))
    shape, stored = timed.checkpoint.header(name)
    wide = torch.promote_types(timed.dtype, torch.float32)
    out = torch.zeros(shape, dtype=wide, device=timed.device)
    other = torch.ones_like(out)
    seconds = clock.quickest(lambda: timed.checkpoint.read(name, out))
    mixing = clock.quickest(lambda: torch.lerp(out, other, 0.5))
    return math.prod(shape) * width(stored) / seconds, math.prod(shape) / mixing


def _one_layer(timed: Timed) -> tuple[Any, nn.Module]:
    """The model's first layer with weights, in a model that has no other."""
    config = copy.deepcopy(text_config(timed.checkpoint.config))
    model: Any = skeleton(config, timed.checkpoint.name)
    layers = Decoder(model).layers
    layer: nn.Module = layers[0]
    del layers[1:]
    for holder in (model.config, model.base_model.config):
        holder.num_hidden_layers = 1
    embedding = nn.Embedding(1, timed.size.hidden, dtype=timed.dtype, device=timed.device)
    model.set_input_embeddings(embedding)
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                made = torch.empty(parameter.shape, dtype=timed.dtype, device=timed.device)
                made.uniform_(-0.05, 0.05)
                module.register_parameter(name, nn.Parameter(made, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(timed.device)
    return model, layer


def _called(
    model: Any, layer: nn.Module, timed: Timed, batch: TextBatch
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the layer is called with, in a batch of one token over and over."""
    found: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        hidden = args[0] if args else given.pop("hidden_states")
        found.append((hidden, given))

    ids = torch.zeros((int(batch.rows), int(batch.width)), dtype=torch.long, device=timed.device)
    with torch.no_grad(), hooked([layer.register_forward_pre_hook(before, with_kwargs=True)]):
        model.base_model(input_ids=ids, use_cache=False)
    return found[0]


def _back(
    layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], weights: Sequence[nn.Parameter]
) -> None:
    """A layer forward, and its gradients by its input and all its weights."""
    entering = hidden.detach().requires_grad_()
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        output = first(layer(entering, **kwargs))
        torch.autograd.grad(output, [entering, *weights], output.detach(), allow_unused=True)


def _unembedding(timed: Timed, positions: int) -> Callable[..., None]:
    """Logits of some positions and a divergence of them, with its gradient or without."""
    size, device = timed.size, timed.device
    weight = torch.full((size.vocabulary, size.hidden), 0.01, dtype=timed.dtype, device=device)
    hidden = torch.ones((positions, size.hidden), dtype=timed.dtype, device=device)

    def run(*, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            entering = hidden.detach().requires_grad_(gradient)
            found = torch.log_softmax((entering @ weight.T).float(), -1)
            if gradient:
                target = found.detach()
                divergence = (target.exp() * (target - found)).sum()
                torch.autograd.grad(divergence, entering)

    return run
