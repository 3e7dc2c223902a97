"""nnsight: traces and edits, as its documentation writes them, one forward a patch."""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from benchmarks.engine.measure import Spent
from benchmarks.engine.peer_task import REPEATS, Task, Written


@torch.no_grad()
def activations(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Exact activation patches of heads."""
    ids, theirs = task.batch.ids, read_by_projections(task, spent, of_neurons=False)
    base = nnsight.NNsight(task.model("base"))
    ours = projections(base._module)[::2]

    def patched(layer: int, head: int) -> torch.Tensor:
        with base.trace(input_ids=ids, use_cache=False):
            projection = base.model.layers[layer].self_attn.o_proj
            own = task.written(projection.input, ours[layer], head)
            projection.output += task.written(*theirs[layer], head) - own
            logits = base.lm_head.output.save()
        return task.gain(logits)

    return {"head": task.each(patched, spent)}


def attribution(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Attribution patches of heads and neurons: two forwards and a backward."""
    ids, theirs = task.batch.ids, read_by_projections(task, spent, of_neurons=True)
    base = nnsight.NNsight(task.model("base").requires_grad_(False))
    ours = projections(base._module)

    def scores() -> dict[str, torch.Tensor]:
        with base.trace(input_ids=ids, use_cache=False):
            base.model.embed_tokens.output.requires_grad_(True)
            read = nnsight.save([])
            written = []
            for layer in base.model.layers:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    read.append(projection.input.detach())
                    written.append(projection.output)
            gain = task.gain(base.lm_head.output)
            with gain.backward():
                gradients = nnsight.save([])
                for output in reversed(written):
                    gradients.append(output.grad)
        found = [
            task.scores(gradient, own, their)
            for gradient, own, their in zip(
                reversed(gradients), zip(read, ours, strict=True), theirs, strict=True
            )
        ]
        heads = [task.by_head(score) for score in found[::2]]
        return {"head": torch.stack(heads), "neuron": torch.stack(found[1::2])}

    return spent.on(scores, repeats=REPEATS)


@torch.no_grad()
def read_by_projections(task: Task, spent: Spent, *, of_neurons: bool) -> list[Written]:
    """What the expert's output projections read, and their weights, layer by layer."""
    expert = nnsight.NNsight(task.model("expert"))

    def cache() -> list[torch.Tensor]:
        with expert.trace(input_ids=task.batch.ids, use_cache=False):
            found = nnsight.save([])
            for layer in expert.model.layers:
                found.append(layer.self_attn.o_proj.input)
                if of_neurons:
                    found.append(layer.mlp.down_proj.input)
        return found

    read = spent.on(cache, repeats=REPEATS if of_neurons else 1)
    weights = projections(expert._module)[:: 1 if of_neurons else 2]
    return list(zip(read, weights, strict=True))


def projections(model: Any) -> list[torch.Tensor]:
    """Weights that heads, then neurons, write through, layer by layer."""
    both = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    return [projection.weight for pair in both for projection in pair]


@torch.no_grad()
def weights(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Exact weight swaps of heads, by edits that compute with the expert's slices."""
    ids, expert = task.batch.ids, task.model("expert")
    base = nnsight.NNsight(task.model("base"))

    def swapped(layer: int, head: int) -> torch.Tensor:
        own, their = (m.model.layers[layer].self_attn for m in (base._module, expert))
        query = task.rows(their.q_proj.weight, head)
        width = len(query)
        cut = slice(head * width, (head + 1) * width)
        out = task.rows((their.o_proj.weight - own.o_proj.weight).T, head)
        with base.edit() as (_, edited):
            attention = edited.model.layers[layer].self_attn
            attention.q_proj.output[..., cut] = attention.q_proj.input @ query.T
            handed = attention.o_proj.input[..., cut]
            attention.o_proj.output += handed @ out
        with edited.trace(input_ids=ids, use_cache=False):
            logits = edited.lm_head.output.save()
        return task.gain(logits)

    return {"head": task.each(swapped, spent)}
