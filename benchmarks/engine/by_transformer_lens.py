"""TransformerLens: its own functions, on its bridge over a loaded model of Hugging Face's."""

from __future__ import annotations

from typing import Any

import pandas
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import generic_activation_patch
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient
from transformers import AutoTokenizer

from benchmarks.engine.measure import Spent
from benchmarks.engine.peer_task import REPEATS, Head, Model, Task, Written, outs


def bridge(task: Task, which: Model) -> Any:
    """A model as this package has it."""
    folder = str(task.case.base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = task.model(which)
    return TransformerBridge.boot_transformers(
        folder, hf_model=model, tokenizer=tokenizer, device="cpu"
    )


@torch.no_grad()
def activations(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Exact activation patches of heads, by the loop that all its patching functions share."""
    ids = task.batch.ids

    def cached(which: Model) -> tuple[Any, dict[str, Written]]:
        model = bridge(task, which)
        _, cache = spent.on(lambda: model.run_with_cache(ids, names_filter=is_z))
        return model, {
            f"blocks.{index}.hook_attn_out": (cache["z", index].flatten(-2), out.weight)
            for index, out in enumerate(outs(model.original_model))
        }

    _, theirs = cached("expert")
    base, own = cached("base")
    both = {name: (own[name], theirs[name]) for name in own}

    def put(output: torch.Tensor, index: Head, there: tuple[Written, Written]) -> torch.Tensor:
        own_written, their_written = (task.written(*one, index[1]) for one in there)
        return output + their_written - own_written

    heads = pandas.DataFrame(task.heads, columns=["layer", "head"])
    found = spent.on(
        lambda: generic_activation_patch(
            base, ids, both, task.gain, put, activation_name="attn_out", index_df=heads
        ),
        task.times,
    )
    return {"head": found}


def attribution(task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Attribution patches of heads and neurons: two forwards and a backward."""
    ids, layers = task.batch.ids, range(task.dims.n_layers)
    read = {"head": "blocks.{}.attn.hook_z", "neuron": "blocks.{}.mlp.hook_post"}
    written = {"head": "blocks.{}.hook_attn_out", "neuron": "blocks.{}.hook_mlp_out"}
    names = [name.format(i) for name in (*read.values(), *written.values()) for i in layers]

    def cached(model: Any, gradients: bool) -> Any:
        with torch.set_grad_enabled(gradients):  # down to the embedding, or the first has none
            return cache_activation_and_gradient(
                model, ids, task.gain, ["hook_embed", *names], gradients
            )

    def weights(model: Any) -> dict[str, list[torch.Tensor]]:
        blocks = model.original_model.model.layers
        return {
            "head": [block.self_attn.o_proj.weight.detach() for block in blocks],
            "neuron": [block.mlp.down_proj.weight.detach() for block in blocks],
        }

    def of_expert() -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
        expert = bridge(task, "expert")
        found = spent.on(lambda: cached(expert, False), repeats=REPEATS)
        return found.activations, weights(expert)

    theirs, their_weights = of_expert()
    base = bridge(task, "base")
    own_weights = weights(base)

    def scores() -> dict[str, torch.Tensor]:
        own = cached(base, True)
        found = {}
        for kind in read:
            of_layers = []
            for layer in layers:
                name = read[kind].format(layer)
                own_read, their_read = (a[name].flatten(2) for a in (own.activations, theirs))
                score = task.scores(
                    own.gradients[written[kind].format(layer)],
                    (own_read, own_weights[kind][layer]),
                    (their_read, their_weights[kind][layer]),
                )
                of_layers.append(task.by_head(score) if kind == "head" else score)
            found[kind] = torch.stack(of_layers)
        return found

    return spent.on(scores, repeats=REPEATS)


def is_z(name: str) -> bool:
    """Whether a hook point is what output projections read."""
    return name.endswith("hook_z")
