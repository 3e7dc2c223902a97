"""The table: one entry for every architecture."""

from __future__ import annotations

from mergekit_wp.architectures.declaration import Architecture

LLAMA = Architecture("llama", "LlamaForCausalLM")

FAMILIES: tuple[Architecture, ...] = (
    LLAMA,
    Architecture("mistral", "MistralForCausalLM"),
    Architecture("qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "Qwen3ForCausalLM"),
)
