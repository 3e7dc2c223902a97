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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.criteria import Criteria, Targets, logit_values
from mergekit_wp.engine.block_changes import (
    BlockInputs,
    Changes,
    LayerWeights,
    OneByOne,
    attention_of,
    layer_layout,
    outputs_of,
)
from mergekit_wp.engine.decoder import Decoder, first, returning
from mergekit_wp.engine.replay import Trace, own_values, replay
from mergekit_wp.engine.weight_swaps import Values, joined
from mergekit_wp.engine.writers import Writer, read_by
from mergekit_wp.terms import SLICED_KINDS, FineKind


@dataclass(frozen=True)
class DonorRun:
    """The donor's residual stream on the receiver's input.

    ``hidden[l]`` enters layer l, the last one leaves the last layer; each ``[n, T, hidden]``.
    """

    hidden: list[torch.Tensor]


def donor_run(
    decoder: Decoder,
    trace: Trace,
    entrance: LayerWeights,
    state_of: Callable[[int], LayerWeights],
) -> DonorRun:
    """Run the donor layer by layer through the receiver's modules; one layer is held at a time.

    Args:
        decoder: the receiving model.
        trace: its recorded run, for the arguments of the layers.
        entrance: the donor's weights that make what enters the first layer, by name.
        state_of: the donor's weights of a layer, by name within the layer.
    """
    hidden = [decoder.entering(trace.batch, entrance)]
    for index, layer in enumerate(decoder.layers):
        call = trace.calls[index]
        output = functional_call(layer, dict(state_of(index)), (hidden[-1],), call.kwargs)
        hidden.append(first(output))
    return DonorRun(hidden)


def activation_inputs(
    decoder: Decoder, index: int, trace: Trace, donor: DonorRun, state: LayerWeights, dims: Dims
) -> dict[FineKind, Changes]:
    """The changes that activation patches of heads, K/V groups and neurons make in one layer.

    Args:
        decoder: the receiving model.
        index: which layer.
        trace: its recorded run.
        donor: the donor's run.
        state: the donor's weights of this layer, by name within the layer.
        dims: component counts.
    """
    layer, call, architecture = decoder.layers[index], trace.calls[index], decoder.architecture
    writers = {kind: Writer.of(decoder, index, kind) for kind in SLICED_KINDS}
    blocks = [writers["head"], writers["neuron"]]
    # a module that makes keys or values, with how its output is shared out
    made = {
        layer.get_submodule(module_of(name)): layer_layout(dims, index, name).places(
            state[name].shape
        )
        for name in architecture.read_by("kv_group", state)
    }
    start = {
        layer.get_submodule(module_of(name)): layer_layout(dims, index, name).start("kv_group")
        for name in architecture.read_by("kv_group", state)
    }
    ours: dict[nn.Module, torch.Tensor] = {}
    theirs: dict[nn.Module, torch.Tensor] = {}

    def run_own() -> None:
        with outputs_of(list(made), ours):
            layer(call.hidden, **call.kwargs)

    def run_donor() -> None:
        with outputs_of(list(made), theirs):
            functional_call(layer, dict(state), (donor.hidden[index],), call.kwargs)

    own = dict(zip(("head", "neuron"), read_by(blocks, run_own, call.hidden), strict=True))
    their = dict(zip(("head", "neuron"), read_by(blocks, run_donor, call.hidden), strict=True))

    def run_with_their_keys(group: int | None = None) -> None:
        with ExitStack() as stack:
            for module, places in made.items():
                group_of = (places - start[module]).to(call.hidden.device)
                where = group_of >= 0 if group is None else group_of == group
                where &= group_of < dims.n_kv_groups
                value = torch.where(where, theirs[module], ours[module])
                stack.enter_context(returning(module, value, as_tuple=False))
            layer(call.hidden, **call.kwargs)

    def written(kind: FineKind) -> BlockInputs:
        writer = writers[kind]
        columns = writer.columns(state[writer.name])
        return BlockInputs(own[kind], their[kind], writer.weight, columns, dims.count(kind))

    def by_groups() -> Changes:
        if "kv_group" in architecture.coupled:
            return OneByOne(
                lambda group: (
                    attention_of(decoder, index, lambda: run_with_their_keys(group))
                    - call.attention.detach()
                ),
                dims.n_kv_groups,
            )
        writer = writers["kv_group"]
        (read,) = read_by([writer], run_with_their_keys, call.hidden)
        weight = writer.weight
        return BlockInputs(own["head"], read, weight, weight, dims.n_kv_groups)

    return {"head": written("head"), "kv_group": by_groups(), "neuron": written("neuron")}


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
    state: LayerWeights,
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
    theirs: dict[nn.Module, Any] = {}
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
    if decoder.architecture.enters(name):
        hidden = decoder.entering(trace.batch, {name: donor_tensor(name)})
        return replay(decoder, trace, hidden.unsqueeze(0), -1, criteria, targets)
    batch = trace.batch
    final = donor.hidden[-1][batch.rows, batch.cols]
    names = [name for name, _ in decoder.model.named_parameters()]
    above = [n for n in names if module_of(n) == decoder.architecture.norm]
    if module_of(name) != decoder.architecture.norm:
        above += [n for n in names if module_of(n) == module_of(name)]
    logits = decoder.logits(final, {n: donor_tensor(n) for n in above})
    values = {c: v.unsqueeze(0) for c, v in own_values(decoder, trace, criteria, targets).items()}
    return values | logit_values(logits.unsqueeze(0), batch, criteria, targets)
