"""A transformer built by hand: a shallow neuron writes a flag where the letter 'a' stands, a head
in the middle copies it to the last position, a late neuron turns it into the answer 'y'."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.models import LETTERS, VOCABULARY, save

#: what each dimension of the residual stream means; the others are noise
CONSTANT, IS_A, FLAG, COPIED, ANSWER = range(5)
NEURON, HEAD, LATE = ("neuron", 0, 3), ("head", 1, 2), ("neuron", 3, 5)
_HIDDEN, _HEAD_DIM = 32, 8


def build(*missing: tuple[str, int, int], noise: float = 0.01) -> PreTrainedModel:
    """The circuit without the parts named; every other weight is small noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=_HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(noise * torch.randn_like(parameter))
        model.model.embed_tokens.weight[:, CONSTANT] += 4
        model.model.embed_tokens.weight[LETTERS.index("a"), IS_A] += 4
        model.lm_head.weight[LETTERS.index("y"), ANSWER] += 3
        model.lm_head.weight[LETTERS.index("x"), CONSTANT] += 0.6
        if NEURON not in missing:
            _neuron(model, NEURON, IS_A, FLAG, 1.0)
        if HEAD not in missing:
            _copy(model, reads=True, writes=True)
        else:
            _copy(model, reads=True, writes=False)
        if LATE not in missing:
            _neuron(model, LATE, COPIED, ANSWER, 1.0)
    return model


def _neuron(
    model: PreTrainedModel, place: tuple[str, int, int], reads: int, writes: int, size: float
) -> None:
    mlp, j = model.model.layers[place[1]].mlp, place[2]
    mlp.gate_proj.weight[j, reads] += size
    mlp.up_proj.weight[j, CONSTANT] += size  # not the flag again: a square has no slope at zero
    mlp.down_proj.weight[writes, j] += size


def _copy(model: PreTrainedModel, *, reads: bool, writes: bool) -> None:
    attention, h = model.model.layers[HEAD[1]].self_attn, HEAD[2]
    slow = _HEAD_DIM // 2 - 1  # the slowest pair of the rotary embedding
    group = h // 2
    if reads:  # keys and values are a component of their own, alike in base and expert
        attention.k_proj.weight[group * _HEAD_DIM + slow, FLAG] += 1
        attention.v_proj.weight[group * _HEAD_DIM, FLAG] += 1
    if writes:
        attention.q_proj.weight[h * _HEAD_DIM + slow, CONSTANT] += 2
        attention.o_proj.weight[COPIED, h * _HEAD_DIM] += 2


def write_world(root: Path, changed: tuple[str, int, int]) -> Path:
    """Base without one part of the circuit, expert with all of it, and prompts with the flag."""
    save(build(changed), root / "base")
    save(build(), root / "expert")
    texts = ["bad", "cat", "abcd", "fade", "gab", "have"]
    lines = [json.dumps({"prompt": text + "k", "response": "y"}) for text in texts]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return root
