"""Activation patches: what components write in the donor's run, put into the receiver's run.

A weight patch changes a component under the receiver's own input; an activation patch gives it
what it writes in the other model, whose input has changed as well. A component that only passes a
signal on has the second effect and not the first ("Weight Patching", arXiv 2604.13694). The
activation of a component, at every position:

- ``head``: what it writes into the residual stream
- ``kv_group``: its keys and values, read by the receiver's own queries
- ``neuron``: what it writes into the residual stream
- ``tensor``: the output of the module it belongs to
- ``layer``: what the layer adds to the residual stream
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.components import Dims, FineKind
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.local import BlockInputs, State, inputs_of
from mergekit_wp.engine.patches import Values, joined
from mergekit_wp.engine.trace import (
    Criteria,
    Decoder,
    Trace,
    first,
    hooked,
    logit_values,
    own_values,
    replay,
    returning,
)


@dataclass(frozen=True)
class DonorRun:
    """The donor's residual stream on the receiver's input.

    ``hidden[l]`` enters layer l, the last one leaves the last layer; each ``[n, T, hidden]``.
    """

    hidden: list[torch.Tensor]


def donor_run(
    decoder: Decoder,
    trace: Trace,
    embedding: torch.Tensor,
    state_of: Callable[[int], State],
) -> DonorRun:
    """Run the donor layer by layer through the receiver's modules; one layer is held at a time.

    Args:
        decoder: the receiving model.
        trace: its recorded run, for the arguments of the layers.
        embedding: the donor's embedding weight.
        state_of: the donor's weights of a layer, by name within the layer.
    """
    weight = {"weight": embedding}
    hidden = [functional_call(decoder.embedding, weight, (trace.batch.ids,))]
    for index, layer in enumerate(decoder.layers):
        call = trace.calls[index]
        output = functional_call(layer, dict(state_of(index)), (hidden[-1],), call.kwargs)
        hidden.append(first(output))
    return DonorRun(hidden)


def activation_inputs(
    decoder: Decoder, index: int, trace: Trace, donor: DonorRun, state: State, dims: Dims
) -> dict[FineKind, BlockInputs]:
    """The changes that activation patches of heads, K/V groups and neurons make in one layer.

    Args:
        decoder: the receiving model.
        index: which layer.
        trace: its recorded run.
        donor: the donor's run.
        state: the donor's weights of this layer, by name within the layer.
        dims: component counts.
    """
    layer, call = decoder.layers[index], trace.calls[index]
    out_proj: nn.Module = layer.self_attn.o_proj
    down_proj: nn.Module = layer.mlp.down_proj
    blocks = [out_proj, down_proj]
    own_attention, own_mlp = inputs_of(blocks, lambda: layer(call.hidden, **call.kwargs))
    keys, values = layer.self_attn.k_proj, layer.self_attn.v_proj
    theirs: dict[nn.Module, torch.Tensor] = {}

    def run_donor() -> None:
        with outputs_of([keys, values], theirs):
            functional_call(layer, dict(state), (donor.hidden[index],), call.kwargs)

    their_attention, their_mlp = inputs_of(blocks, run_donor)

    def run_with_their_keys() -> None:
        with (
            returning(keys, theirs[keys], as_tuple=False),
            returning(values, theirs[values], as_tuple=False),
        ):
            layer(call.hidden, **call.kwargs)

    (with_their_keys,) = inputs_of([out_proj], run_with_their_keys)
    own_out: torch.Tensor = layer.self_attn.o_proj.weight
    own_down: torch.Tensor = layer.mlp.down_proj.weight
    return {
        "head": BlockInputs(
            own_attention, their_attention, own_out, state["self_attn.o_proj.weight"], dims.n_heads
        ),
        "kv_group": BlockInputs(own_attention, with_their_keys, own_out, own_out, dims.n_kv_groups),
        "neuron": BlockInputs(
            own_mlp, their_mlp, own_down, state["mlp.down_proj.weight"], dims.n_neurons
        ),
    }


@contextmanager
def outputs_of(
    modules: Sequence[nn.Module], found: dict[nn.Module, torch.Tensor]
) -> Iterator[None]:
    """Collect what modules return while the context lasts."""

    def keep(module: nn.Module, _args: object, output: torch.Tensor) -> None:
        found[module] = first(output).detach()

    with hooked([module.register_forward_hook(keep) for module in modules]):
        yield


def put_layer(
    decoder: Decoder,
    index: int,
    trace: Trace,
    donor: DonorRun,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Let a layer add to the residual stream what it adds in the donor's run: ``[1, n]``."""
    added = donor.hidden[index + 1] - donor.hidden[index]
    hidden = (trace.calls[index].hidden + added).unsqueeze(0)
    return replay(decoder, trace, hidden, index, criteria, targets)


def put_modules(
    decoder: Decoder,
    index: int,
    trace: Trace,
    donor: DonorRun,
    state: State,
    names: Sequence[str],
    criteria: Criteria,
    targets: Targets,
    copies: int,
) -> Values:
    """Let the modules that tensors of one layer belong to return what they return in the donor.

    Args:
        decoder: the receiving model.
        index: the layer.
        trace: the receiver's recorded run.
        donor: the donor's run.
        state: the donor's weights of this layer.
        names: of tensors, within the layer; one patch each.
        criteria: which criteria to read.
        targets: what they are measured against.
        copies: patches per replay.

    Returns:
        Values ``[len(names), n]`` per criterion.
    """
    layer, call = decoder.layers[index], trace.calls[index]
    modules = [layer.get_submodule(name.rpartition(".")[0]) for name in names]
    theirs: dict[nn.Module, torch.Tensor] = {}
    with outputs_of(modules, theirs):
        functional_call(layer, dict(state), (donor.hidden[index],), call.kwargs)
    parts = []
    for start in range(0, len(modules), copies):
        outputs = []
        for module in modules[start : start + copies]:
            with returning(module, theirs[module], as_tuple=False):
                outputs.append(first(layer(call.hidden, **call.kwargs)))
        parts.append(replay(decoder, trace, torch.stack(outputs), index, criteria, targets))
    return joined(parts, criteria)


def put_outside_layers(
    decoder: Decoder,
    trace: Trace,
    donor: DonorRun,
    donor_tensor: Callable[[str], torch.Tensor],
    name: str,
    criteria: Criteria,
    targets: Targets,
) -> Values:
    """Let the embedding, the final norm or the unembedding return what it returns in the donor.

    A tied tensor counts as the embedding. The output of the unembedding is the answer itself, so
    its effect is the whole of it.

    Returns:
        Values ``[1, n]`` per criterion.
    """
    if name == "model.embed_tokens.weight":
        return replay(decoder, trace, donor.hidden[0].unsqueeze(0), -1, criteria, targets)
    batch = trace.batch
    final = donor.hidden[-1][batch.rows, batch.cols]
    norm = {"weight": donor_tensor("model.norm.weight")}
    normed = functional_call(decoder.norm, norm, (final,))
    head = {}
    if name == "lm_head.weight":
        head = {"weight": donor_tensor(name)}
    logits = functional_call(decoder.head, head, (normed,))
    values = {c: v.unsqueeze(0) for c, v in own_values(decoder, trace, criteria, targets).items()}
    return values | logit_values(logits.unsqueeze(0), batch, criteria, targets)
