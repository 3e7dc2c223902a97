"""Random models of known shapes, in files: time and FLOPs do not depend on the numbers."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.engine.measure import timed
from mergekit_wp.models.lora import CONFIG, WEIGHTS

_LLAMA = {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None}
#: hidden, MLP, layers, heads, groups, vocabulary, tied
SIZES = {
    "tiny": (64, 176, 4, 4, 2, 512, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, False),
}
#: of the largest changes, about
_SMALL = 0.002


def config_of(shape: str, depth: int | None = None) -> LlamaConfig:
    """The configuration of a shape, with fewer layers where a depth is given."""
    hidden, mlp, layers, heads, groups, vocabulary, tied = SIZES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=depth or layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        **_LLAMA,
    )


def write_models(
    config: LlamaConfig, device: str, dtype: torch.dtype, folder: Path, experts: Sequence[str]
) -> None:
    """A random base, and experts of these names that differ a little everywhere, in files."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="4GB")
    for name in experts:  # each from the one before: as random as from the base
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * _SMALL)
        model.save_pretrained(folder / name, max_shard_size="4GB")


def write_adapter(config: LlamaConfig, dtype: torch.dtype, folder: Path, rank: int) -> None:
    """A random LoRA adapter of all matrices in all layers, as peft writes it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    side, tensors = (_SMALL / rank**0.5) ** 0.5, {}
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            outputs, inputs = parameter.shape
            key = f"base_model.model.{name.removesuffix('.weight')}"
            for letter, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"{key}.lora_{letter}.weight"] = (torch.randn(size) * side).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    (folder / CONFIG).write_text(json.dumps(said))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a letter."""
    tokens = {letter: 3 + i for i, letter in enumerate(string.ascii_lowercase)}
    tokenizer = Tokenizer(models.BPE(tokens | {"<unk>": 0, "<eos>": 2}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def prompts(count: int, length: int, response: int, seed: int) -> list[dict[str, Any]]:
    """Random prompts with responses for `write_tokenizer`, of so many tokens with the last."""
    generator = torch.Generator().manual_seed(seed)

    def letters(n: int) -> str:
        drawn = torch.randint(len(string.ascii_lowercase), (n,), generator=generator)
        return "".join(string.ascii_lowercase[i] for i in drawn)

    return [
        {"prompt": letters(length - response), "response": letters(response - 1)}
        for _ in range(count)
    ]


def matmul_throughput(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    x = torch.randn((n, n), device=device).to(dtype)
    _, seconds, _ = timed(lambda: x @ x, 10)
    return 2 * n**3 / seconds
