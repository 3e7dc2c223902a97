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
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.criteria import logit_values
from mergekit_wp.engine.block_changes import (
    BlockInputs,
    Changes,
    OneByOne,
    attention_of,
    layer_layout,
    outputs_of,
)
from mergekit_wp.engine.decoder import first, returning
from mergekit_wp.engine.donor import Donor
from mergekit_wp.engine.replay import Receiver, Values
from mergekit_wp.engine.weight_swaps import replayed
from mergekit_wp.engine.writers import Writer, read_by
from mergekit_wp.terms import SLICED_KINDS, FineKind


def activation_inputs(
    receiver: Receiver, index: int, donor: Donor, kinds: Sequence[FineKind] = SLICED_KINDS
) -> dict[FineKind, Changes]:
    """The changes that activation patches make in one layer.

    Args:
        receiver: the model with its recorded run.
        index: which layer.
        donor: whose run on the same input the activations are of.
        kinds: of ``head``, ``kv_group`` and ``neuron``, those that are asked for.
    """
    decoder, call = receiver.decoder, receiver.recording.calls[index]
    layer, dims, architecture = decoder.layers[index], decoder.dims, decoder.architecture
    state = donor.layer(index)
    writers = {kind: Writer.of(decoder, index, kind) for kind in kinds}
    blocks = {writer.name: writer for writer in writers.values()}
    made: dict[nn.Module, torch.Tensor] = {}  # keys or values, of which group each output is
    for name in architecture.read_by("kv_group", state) if "kv_group" in kinds else ():
        layout = layer_layout(dims, index, name)
        group_of = layout.places(state[name].shape) - layout.start("kv_group")
        made[layer.get_submodule(module_of(name))] = group_of.to(call.hidden.device)
    ours: dict[nn.Module, torch.Tensor] = {}
    theirs: dict[nn.Module, torch.Tensor] = {}

    def read(
        run: Callable[[], object], found: dict[nn.Module, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with outputs_of(list(made), found):
            return dict(zip(blocks, read_by([*blocks.values()], run, call.hidden), strict=True))

    donor.run(receiver, index)  # now, so that of what follows only this layer is read
    their = read(lambda: donor.pass_through(receiver, index, state), theirs)
    own = call.read
    if made or not blocks.keys() <= own.keys():
        idle = returning(decoder.mlp(index), call.mlp, as_tuple=False)
        with idle if "neuron" not in kinds else nullcontext():
            own = read(lambda: layer(call.hidden, **call.kwargs), ours)

    def run_with_their_keys(group: int | None = None) -> None:
        with ExitStack() as stack:
            for module, group_of in made.items():
                where = group_of >= 0 if group is None else group_of == group
                where &= group_of < dims.n_kv_groups
                value = torch.where(where, theirs[module], ours[module])
                stack.enter_context(returning(module, value, as_tuple=False))
            stack.enter_context(returning(decoder.mlp(index), call.mlp, as_tuple=False))
            layer(call.hidden, **call.kwargs)

    def written(kind: FineKind) -> BlockInputs:
        writer = writers[kind]
        columns = writer.columns(state[writer.name])
        name = writer.name
        return BlockInputs(own[name], their[name], writer.weight, columns, dims.count(kind))

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
        (theirs_read,) = read_by([writer], run_with_their_keys, call.hidden)
        weight = writer.weight
        return BlockInputs(own[writer.name], theirs_read, weight, weight, dims.n_kv_groups)

    return {kind: by_groups() if kind == "kv_group" else written(kind) for kind in kinds}


def put_layer(receiver: Receiver, index: int, donor: Donor) -> Values:
    """Let a layer add to the residual stream what it adds in the donor's run: ``[1, n]``."""
    theirs = donor.run(receiver, index + 1)
    added = theirs[index + 1] - theirs[index]
    hidden = (receiver.recording.calls[index].hidden + added).unsqueeze(0)
    return receiver.replay(hidden, index)


def put_modules(receiver: Receiver, index: int, donor: Donor, names: Sequence[str]) -> Values:
    """Let the modules that tensors of one layer belong to return what they return in the donor.

    Args:
        receiver: the model with its recorded run.
        index: the layer.
        donor: whose modules they are.
        names: of tensors, within the layer; one patch each.

    Returns:
        Values ``[len(names), n]`` per criterion.
    """
    layer, call = receiver.decoder.layers[index], receiver.recording.calls[index]
    modules = [layer.get_submodule(module_of(name)) for name in names]
    theirs: dict[nn.Module, Any] = {}
    state = donor.layer(index)
    donor.run(receiver, index)
    with outputs_of(modules, theirs):
        donor.pass_through(receiver, index, state)

    def output(some: Sequence[nn.Module]) -> torch.Tensor:
        outputs = []
        for module in some:
            with returning(module, theirs[module], as_tuple=False):
                outputs.append(first(layer(call.hidden, **call.kwargs)))
        return torch.stack(outputs)

    return replayed(receiver, index, modules, output)


def put_outside_layers(receiver: Receiver, donor: Donor, name: str) -> Values:
    """Let the embedding, the final norm or the unembedding return what it returns in the donor.

    A tied tensor counts as the embedding. The output of the unembedding is the answer itself, so
    its effect is the whole of it.

    Returns:
        Values ``[1, n]`` per criterion.
    """
    decoder, batch = receiver.decoder, receiver.batch
    if decoder.architecture.enters(name):
        hidden = decoder.entering(batch, donor.tensors([name]))
        return receiver.replay(hidden.unsqueeze(0), -1)
    final = donor.run(receiver)[-1][batch.rows, batch.cols]
    names = [name for name, _ in decoder.model.named_parameters()]
    above = [n for n in names if module_of(n) == decoder.architecture.norm]
    if module_of(name) != decoder.architecture.norm:
        above += [n for n in names if module_of(n) == module_of(name)]
    logits = decoder.logits(final, donor.tensors(above)).unsqueeze(0)
    values = {c: v.unsqueeze(0) for c, v in receiver.own.items()}
    return values | logit_values(logits, batch, receiver.criteria, receiver.targets)
