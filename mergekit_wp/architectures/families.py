"""The table: one entry for every architecture (docs/new-architecture.md)."""

from __future__ import annotations

from mergekit_wp.architectures.declaration import LLAMA_CUTS, Architecture, Cut, columns, rows

LLAMA = Architecture("llama", "LlamaForCausalLM")

#: the experts of a mixture as transformers stacks them: every expert's gate rows, then up rows
_STACKED = LLAMA_CUTS | {
    "mlp.experts.gate_up_proj": Cut(("neuron", "neuron"), (0, 1)),
    "mlp.experts.down_proj": Cut(("neuron",), (0, 2)),
}
#: a head's query, key and value rows, then the next head's
_INTERLEAVED = Cut(("head", "kv_group", "kv_group"), interleaved=True)

FAMILIES: tuple[Architecture, ...] = (
    LLAMA,
    Architecture("mistral", "MistralForCausalLM"),
    Architecture(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        stored_prefix="language_model.",
        text_type="mistral",
    ),
    Architecture("qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "Qwen3ForCausalLM"),
    Architecture("granite", "GraniteForCausalLM"),
    Architecture("cohere2", "Cohere2ForCausalLM", parallel=lambda config: True),
    Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        coupled=frozenset({"head", "kv_group"}),  # a norm over all heads' queries, one over keys
    ),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        attention_implementation="eager",  # the only one that caps attention logits
    ),
    Architecture("gemma3_text", "Gemma3ForCausalLM"),
    Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        mlp_out="mlp.c_proj.weight",
        cuts=LLAMA_CUTS
        | {
            "mlp.c_fc.weight": rows("neuron"),
            "mlp.c_fc.bias": rows("neuron"),
            "mlp.c_proj.weight": columns("neuron"),
        },
    ),
    Architecture(
        "phi",
        "PhiForCausalLM",
        norm="model.final_layernorm",
        attention_out="self_attn.dense.weight",
        mlp_out="mlp.fc2.weight",
        cuts=LLAMA_CUTS
        | {
            "self_attn.dense.weight": columns("head"),
            "mlp.fc1.weight": rows("neuron"),
            "mlp.fc1.bias": rows("neuron"),
            "mlp.fc2.weight": columns("neuron"),
        },
        parallel=lambda config: True,
    ),
    Architecture(
        "phi3",
        "Phi3ForCausalLM",
        cuts=LLAMA_CUTS
        | {
            "self_attn.qkv_proj.weight": rows("head", "kv_group", "kv_group"),
            "mlp.gate_up_proj.weight": rows("neuron", "neuron"),
        },
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        attention="attention",
        attention_out="attention.dense.weight",
        mlp_out="mlp.dense_4h_to_h.weight",
        cuts={
            "attention.query_key_value.weight": _INTERLEAVED,
            "attention.query_key_value.bias": _INTERLEAVED,
            "attention.dense.weight": columns("head"),
            "mlp.dense_h_to_4h.weight": rows("neuron"),
            "mlp.dense_h_to_4h.bias": rows("neuron"),
            "mlp.dense_4h_to_h.weight": columns("neuron"),
        },
        parallel=lambda config: bool(config.use_parallel_residual),
        stored_as={"lm_head.weight": "embed_out.weight"},
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        layers="transformer.h",
        embedding="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        attention="attn",
        attention_out="attn.c_proj.weight",
        mlp_out="mlp.c_proj.weight",
        # its Conv1D modules store weights transposed: outputs are columns
        cuts={
            "attn.c_attn.weight": Cut(("head", "kv_group", "kv_group"), (1,)),
            "attn.c_attn.bias": rows("head", "kv_group", "kv_group"),
            "attn.c_proj.weight": rows("head"),
            "mlp.c_fc.weight": columns("neuron"),
            "mlp.c_fc.bias": rows("neuron"),
            "mlp.c_proj.weight": rows("neuron"),
        },
        n_neurons=lambda config: int(config.n_inner or 4 * config.n_embd),
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        mlp_out="mlp.experts.down_proj",
        cuts=_STACKED,
        n_neurons=lambda config: int(config.num_local_experts * config.intermediate_size),
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        mlp_out="mlp.experts.down_proj",
        cuts=_STACKED,
        n_neurons=lambda config: int(config.num_experts * config.moe_intermediate_size),
        mixed_layers=lambda config: bool(config.mlp_only_layers) or config.decoder_sparse_step != 1,
    ),
)
