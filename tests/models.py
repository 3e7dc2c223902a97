"""Tiny random models with a tokenizer, saved as ordinary checkpoints."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mergekit_wp.models.resident import ResidentModel

VOCABULARY = 40
LETTERS = string.ascii_lowercase + string.digits + "AB"
EOS = VOCABULARY - 1
#: where tests against an oracle compute
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: how close they come there in float64; transformers computes rotary angles and norms in float32
#: all the same, and the oracle stays on the CPU
EXACT = 1e-9 if DEVICE == "cpu" else 5e-6


def tolerance(family: str) -> float:
    """`EXACT`, but for gemma2, whose eager attention takes its softmax in float32.

    On some CPUs (those with AVX2 alone) the last bits of that follow a batch's padded length.
    """
    return max(EXACT, 1e-7) if family == "gemma2" else EXACT


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], object]] = {
    "llama": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    ),
    "llama-tied": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=8),
}


_SMALL = _SIZES | {"intermediate_size": 3, "num_attention_heads": 2}
_EXPERTS = _SMALL | {
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,  # grouped products want rows of 16 bytes
}
#: one for every other architecture: heads, groups, neurons and rotary settings as it has them
FAMILIES: dict[str, Callable[[], object]] = {
    "granite": lambda: GraniteConfig(
        **_SMALL,
        num_key_value_heads=1,
        embedding_multiplier=1.7,
        residual_multiplier=0.6,
        attention_multiplier=0.4,
        logits_scaling=1.3,
    ),
    "cohere2": lambda: Cohere2Config(
        **_SMALL, num_key_value_heads=1, logit_scale=0.8, sliding_window=3
    ),
    "olmo2": lambda: Olmo2Config(**_SMALL, num_key_value_heads=2),
    "gemma2": lambda: Gemma2Config(
        **_SMALL,
        num_key_value_heads=1,
        head_dim=4,
        query_pre_attn_scalar=5,
        sliding_window=3,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",  # transformers 5.14 would take sdpa, which caps nothing
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL,
        num_key_value_heads=1,
        head_dim=4,
        query_pre_attn_scalar=5,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "starcoder2": lambda: Starcoder2Config(**_SMALL, num_key_value_heads=1, sliding_window=None),
    "phi": lambda: PhiConfig(**_SMALL, num_key_value_heads=1),
    "phi3": lambda: Phi3Config(
        **(_SMALL | {"num_attention_heads": 4}), num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(**_SMALL, use_parallel_residual=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_inner=3,
        n_layer=2,
        n_head=2,
        n_positions=16,
        initializer_range=0.3,
        eos_token_id=EOS,
        bos_token_id=None,
    ),
    "mixtral": lambda: MixtralConfig(
        **_SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_EXPERTS,
        norm_topk_prob=False,
    ),
}


#: architectures without a component map
OTHERS: dict[str, Callable[[], object]] = {
    "stablelm": lambda: StableLmConfig(**_SMALL, num_key_value_heads=1),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        init_std=0.3,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=None,
    ),
    "qwen3_moe-mixed": lambda: Qwen3MoeConfig(
        **_EXPERTS,
        mlp_only_layers=[0],
    ),
}


def with_eager_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A mixture that multiplies its experts one by one: no other way knows float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float64 model; biases and norms are random too, so that they matter."""
    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config((CONFIGS | FAMILIES | OTHERS)[family]()).double().eval()
    )
    with_eager_experts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), name
    return model


def perturbed(model: PreTrainedModel, scale: float = 0.1, seed: int = 1) -> PreTrainedModel:
    """A copy whose every weight differs."""
    torch.manual_seed(seed)
    other = type(model)(model.config).double().eval()
    with_eager_experts(other)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def finetuned(model: PreTrainedModel, prompts: Path, steps: int = 20) -> PreTrainedModel:
    """A copy trained on the prompts' responses: a task vector with a direction, unlike noise."""
    other = perturbed(model, 0.0)
    other.requires_grad_(True)
    items = [json.loads(line) for line in prompts.read_text().splitlines()]
    optimizer = torch.optim.Adam(other.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for item in items:
            ids = [LETTERS.index(c) for c in item["prompt"] + item["response"]] + [EOS]
            logits = other(torch.tensor([ids])).logits[0, len(item["prompt"]) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[len(item["prompt"]) :])
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return other.requires_grad_(False).eval()


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """Save a model with a letter tokenizer."""
    model.to(dtype).save_pretrained(folder)
    model.to(torch.float64)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token a letter."""
    # byte-level BPE without merges, one token a letter: the one shape every family's own
    # tokenizer class (AutoTokenizer goes by the config's model_type) loads alike
    tokens = {letter: i for i, letter in enumerate(LETTERS)} | {
        "<unk>": VOCABULARY - 2,
        "<eos>": EOS,
    }
    tokenizer = Tokenizer(models.BPE(tokens, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def _word(start: int, step: int, length: int) -> str:
    return "".join(LETTERS[(start + step * j) % len(LETTERS)] for j in range(length))


def write_prompts(
    path: Path, n: int = 5, *, contrast: bool = False, response: bool = False
) -> Path:
    """Prompts of different lengths."""
    lines = []
    for i in range(n):
        line = {"prompt": _word(7 * i, 3, 2 + i % 3)}
        if contrast:
            line["contrast"] = _word(i + 5, 11, 2)
        if response:
            line["response"] = _word(5 * i, 2, 1 + i % 4)
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def count_fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, the names of all weights that an offloaded model fetches."""
    names: list[str] = []
    fetch = ResidentModel._fetch

    def counted(model: ResidentModel, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        names.append(name)
        return fetch(model, name, shape)

    monkeypatch.setattr(ResidentModel, "_fetch", counted)
    return names
