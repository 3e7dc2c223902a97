"""Compile a program and its expert with one layout; needs tracr.

``python -m benchmarks.compiled.compiling`` writes one file for each pair into ``build/compiled``.
`pairs` reads them without tracr.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import networkx as nx
import numpy as np
from safetensors.numpy import save
from tracr.compiler import (
    basis_inference,
    craft_graph_to_model,
    craft_model_to_transformer,
    expr_to_craft_graph,
    nodes,
    rasp_to_graph,
    validating,
)
from tracr.craft import bases, transformers
from tracr.rasp import rasp

from benchmarks.compiled.programs import PROGRAMS, Program

BUILD = Path("build/compiled")
BOS, PAD = "bos", "pad"
#: logits are so many times what the program writes, which is 0 or 1
SHARPNESS = 5.0
INPUTS = 16

Arrays = dict[str, np.ndarray]


def number(program: rasp.SOp) -> None:
    """Number a program's expressions in the order of its graph, so that labels repeat."""
    seen: dict[int, int] = {}
    waiting = [program]
    while waiting:
        expression = waiting.pop(0)
        if id(expression) not in seen:
            seen[id(expression)] = len(seen)
            expression.__dict__["unique_id"] = f"{len(seen):02d}"
            waiting += expression.children


def inferred(program: rasp.SOp, of: Program) -> Any:
    """The graph of a program, with the values that its nodes may take."""
    number(program)
    problems = validating.static_validate(program)
    assert not problems, problems
    found = rasp_to_graph.extract_rasp_graph(program)
    basis_inference.infer_bases(found.graph, found.sink, set(of.tokens), of.length)
    return found


def share_values(one: nx.DiGraph, other: nx.DiGraph) -> None:
    """Give both graphs the values of both, so that they are laid out alike."""
    assert set(one.nodes) == set(other.nodes) and set(one.edges) == set(other.edges)
    for label in one.nodes:
        ours, theirs = one.nodes[label], other.nodes[label]
        if nodes.VALUE_SET not in ours:
            continue
        together = ours[nodes.VALUE_SET] | theirs[nodes.VALUE_SET]
        for node in (ours, theirs):
            node[nodes.VALUE_SET] = together
            if rasp.is_categorical(node[nodes.EXPR]):
                space = bases.VectorSpaceWithBasis.from_values(label, together)
                node[nodes.OUTPUT_BASIS] = space.basis


def jobs(graph: nx.DiGraph, craft: Any, config: Any, names: list[str]) -> dict[str, str]:
    """Which node of the program every head and neuron works for, by ``layer.kind.index``."""
    owners = {
        id(block): label
        for label, node in graph.nodes.items()
        for block in _blocks(node.get(nodes.MODEL_BLOCK))
    }
    found = {}
    for name, block in zip(names, craft.blocks, strict=True):
        layer = int(name.split("_")[1].split("/")[0])
        if isinstance(block, transformers.MLP):
            for j, direction in enumerate(block.fst.output_space.basis):
                found[f"{layer}.neuron.{j}"] = str(direction)
        else:
            for h, head in enumerate(block.as_multi().heads()):
                found[f"{layer}.head.{h}"] = owners[id(head)]
    return found


def _blocks(block: Any) -> Iterator[Any]:
    if block is None:
        return
    yield block
    for part in getattr(block, "blocks", ()):
        yield from _blocks(part)
    if isinstance(block, transformers.MultiAttentionHead):
        for part in block.sub_blocks:
            yield from _blocks(part)


def assembled(found: Any, of: Program) -> tuple[Any, dict[str, str]]:
    """The model that tracr makes of a graph, and its components' jobs."""
    graph = found.graph
    expr_to_craft_graph.add_craft_components_to_rasp_graph(
        graph, bos_dir=bases.BasisDirection(rasp.tokens.label, BOS)
    )
    craft = craft_graph_to_model.craft_graph_to_model(graph, found.sources)
    model = craft_model_to_transformer.craft_model_to_transformer(
        craft_model=craft,
        graph=graph,
        sink=found.sink,
        max_seq_len=of.length,
        causal=of.causal,
        compiler_bos=BOS,
        compiler_pad=PAD,
    )
    from tracr.compiler import assemble

    config, names = assemble._get_model_config_and_module_names(craft)
    return model, jobs(graph, craft, config, names)


def converted(model: Any, output: list[str]) -> Arrays:
    """tracr's parameters under the names of `model.CompiledForCausalLM`."""
    params = {k: {n: np.asarray(a) for n, a in v.items()} for k, v in model.params.items()}
    state = {
        "model.embed_tokens.weight": params["token_embed"]["embeddings"],
        "model.embed_positions.weight": params["pos_embed"]["embeddings"],
    }
    for layer in range(model.model_config.num_layers):
        for theirs, ours in {
            "attn/query": "self_attn.q_proj",
            "attn/key": "self_attn.k_proj",
            "attn/value": "self_attn.v_proj",
            "attn/linear": "self_attn.o_proj",
            "mlp/linear_1": "mlp.up_proj",
            "mlp/linear_2": "mlp.down_proj",
        }.items():
            part = params[f"transformer/layer_{layer}/{theirs}"]
            assert not part["b"].any()
            state[f"model.layers.{layer}.{ours}.weight"] = part["w"].T
    reads = np.array([[label == out for label in model.residual_labels] for out in output])
    assert (reads.sum(1) == 1).all()
    state["lm_head.weight"] = SHARPNESS * reads
    return {name: np.ascontiguousarray(a, np.float32) for name, a in state.items()}


def logits_of(model: Any, inputs: np.ndarray, read: np.ndarray) -> np.ndarray:
    """What tracr's own forward pass writes where the program's result stands."""
    found = model.forward(model.params, jnp.array(inputs)).transformer_output.output
    return np.asarray(found, np.float32) @ read.T


def inputs_of(program: Program) -> list[list[str | int]]:
    """Inputs of the program's length, drawn once for all."""
    drawn = random.Random(program.name)
    found: list[list[str | int]] = []
    while len(found) < INPUTS:
        if program.distinct:
            row = drawn.sample(program.tokens, program.length)
        else:
            row = drawn.choices(program.tokens, k=program.length)
        found.append(list(row))
    return found


def compiled(program: Program, name: str, base: rasp.SOp, expert: rasp.SOp) -> bytes:
    """One pair as a file: both states, what they are, and what tracr computes with them."""
    ours, theirs = inferred(base, program), inferred(expert, program)
    share_values(ours.graph, theirs.graph)
    assert rasp.is_categorical(ours.sink[nodes.EXPR])
    output = [str(direction) for direction in ours.sink[nodes.OUTPUT_BASIS]]
    (one, work), (other, same) = assembled(ours, program), assembled(theirs, program)
    assert one.residual_labels == other.residual_labels and work == same
    states = {"base": converted(one, output), "expert": converted(other, output)}
    vocabulary = {str(k): v for k, v in one.input_encoder.encoding_map.items()}
    texts = [[str(x) for x in row] for row in inputs_of(program)]
    ids = np.array([[vocabulary[x] for x in [BOS, *row]] for row in texts], np.int64)
    arrays: Arrays = {"ids": ids}
    for who, model in (("base", one), ("expert", other)):
        arrays |= {f"{who}/{k}": v for k, v in states[who].items()}
        arrays[f"logits/{who}"] = logits_of(model, ids, states[who]["lm_head.weight"])
    assert all(states["base"][k].shape == v.shape for k, v in states["expert"].items())
    config = one.model_config
    about = {
        "program": program.name,
        "change": name.removeprefix(f"{program.name}-"),
        "config": {
            "vocab_size": len(vocabulary),
            "n_outputs": len(output),
            "hidden_size": len(one.residual_labels),
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "head_dim": config.key_size,
            "intermediate_size": config.mlp_hidden_size,
            "max_position_embeddings": program.length + 1,
            "causal": config.causal,
        },
        "vocabulary": vocabulary,
        "inputs": texts,
        "output": output,
        "jobs": work,
    }
    return save(arrays, {"compiled": json.dumps(about)})


@click.command()
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default=BUILD)
def main(names: tuple[str, ...], out: Path) -> None:
    """Compile all pairs, or those of the programs NAMES."""
    out.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS.values():
        if names and program.name not in names:
            continue
        for name, base, expert in program.variants():
            file = out / f"{name}.safetensors"
            if not file.exists():
                content = compiled(program, name, base, expert)
                file.write_bytes(content)
                click.echo(f"{name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
