"""The decoder that compiled programs run in: no norm, ReLU, attention to all tokens or causal.

Declared through the public `register_architecture`, as any package would declare its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import mergekit_wp as wp
from mergekit_wp.architectures.declaration import columns, rows

BOS, PAD = "bos", "pad"


class CompiledConfig(PreTrainedConfig):
    """Sizes of a compiled program, and whether its attention is causal."""

    model_type = "wp_compiled"

    def __init__(
        self,
        vocab_size: int = 4,
        n_outputs: int = 2,
        hidden_size: int = 4,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        head_dim: int = 4,
        intermediate_size: int = 4,
        max_position_embeddings: int = 4,
        causal: bool = False,
        **others,
    ) -> None:
        self.vocab_size, self.n_outputs, self.hidden_size = vocab_size, n_outputs, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.head_dim, self.intermediate_size = head_dim, intermediate_size
        self.max_position_embeddings, self.causal = max_position_embeddings, causal
        super().__init__(**{"tie_word_embeddings": False, **others})


class Attention(nn.Module):
    def __init__(self, config: CompiledConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.num_attention_heads, config.causal
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(read.transpose(1, 2).flatten(2)), None


class MLP(nn.Module):
    def __init__(self, config: CompiledConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).relu())


class Layer(nn.Module):
    def __init__(self, config: CompiledConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)[0]
        return x + self.mlp(x)


class CompiledPreTrained(PreTrainedModel):
    config_class = CompiledConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)


class CompiledModel(CompiledPreTrained):
    def __init__(self, config: CompiledConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> BaseModelOutput:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.embed_tokens(input_ids) + self.embed_positions(places)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


class CompiledForCausalLM(CompiledPreTrained):
    """Its logits are of the program's outputs, which need not be its input tokens."""

    def __init__(self, config: CompiledConfig) -> None:
        super().__init__(config)
        self.model = CompiledModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.n_outputs, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **_) -> CausalLMOutput:
        hidden = self.model(input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


def declare() -> None:
    """Make the class known to transformers and to mergekit-wp."""
    AutoConfig.register("wp_compiled", CompiledConfig, exist_ok=True)
    AutoModelForCausalLM.register(CompiledConfig, CompiledForCausalLM, exist_ok=True)
    attention = {f"self_attn.{x}_proj.weight": rows("kv_group") for x in "kv"}
    wp.register_architecture(
        wp.Architecture(
            "wp_compiled",
            "CompiledForCausalLM",
            positions="model.embed_positions",
            norm=None,
            cuts={
                **attention,
                "self_attn.q_proj.weight": rows("head"),
                "self_attn.o_proj.weight": columns("head"),
                "mlp.up_proj.weight": rows("neuron"),
                "mlp.down_proj.weight": columns("neuron"),
            },
        )
    )


def save_tokenizer(vocabulary: dict[str, int], folder: Path) -> None:
    """Write the tokenizer of a program: tokens between blanks, behind the compiler's own first."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=PAD, pad_token=PAD
    ).save_pretrained(folder)
