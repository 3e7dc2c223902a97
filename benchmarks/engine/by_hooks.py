"""Plain PyTorch hooks, and weights written into the model: what needs no package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.engine.measure import Spent
from benchmarks.engine.peer_task import Task, Written, outs
from mergekit_wp.engine.decoder import hooked


@torch.no_grad()
def activations(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Exact activation patches of heads: one forward each."""
    theirs, base = read_by_heads(task, task.model("expert"), spent), task.model("base")

    def patched(layer: int, head: int) -> torch.Tensor:
        def after(module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> Any:
            own = task.written(args[0], module.weight, head)
            return output + task.written(*theirs[layer], head) - own

        with hooked([outs(base)[layer].register_forward_hook(after)]):
            return task.gain(base(input_ids=task.batch.ids, use_cache=False).logits)

    return {"head": task.each(patched, spent)}


def read_by_heads(task: Task, model: PreTrainedModel, spent: Spent) -> list[Written]:
    """What a model's output projections read, and their weights, by layer."""
    found: list[Written] = []

    def before(module: nn.Linear, args: tuple[torch.Tensor]) -> None:
        found.append((args[0], module.weight))

    with hooked([out.register_forward_pre_hook(before) for out in outs(model)]):
        spent.on(lambda: model(input_ids=task.batch.ids, use_cache=False))
    return found


@torch.no_grad()
def weights(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Exact weight swaps of heads: written into the model, and put back after its forward."""
    ids, base, expert = task.batch.ids, task.model("base"), task.model("expert")

    def swapped(layer: int, head: int) -> torch.Tensor:
        own, their = (model.model.layers[layer].self_attn for model in (base, expert))
        rows = task.rows(own.q_proj.weight, head)
        columns = task.rows(own.o_proj.weight.T, head)
        kept = rows.clone(), columns.clone()
        rows.copy_(task.rows(their.q_proj.weight, head))
        columns.copy_(task.rows(their.o_proj.weight.T, head))
        found = task.gain(base(input_ids=ids, use_cache=False).logits)
        rows.copy_(kept[0])
        columns.copy_(kept[1])
        return found

    return {"head": task.each(swapped, spent)}
