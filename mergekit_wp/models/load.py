"""Models of transformers, empty or whole, with the attention that computes all they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_wp.architectures import of_type, text_config


def skeleton(config: Any) -> PreTrainedModel:
    """The text model with parameters on the meta device and real buffers."""
    config = text_config(config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), trust_remote_code=False
        )
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model


def parameter_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's own weights; tied copies are listed once."""
    return [name for name, _ in model.named_parameters()]


def load_folder(folder: str | Path, dtype: torch.dtype | str, device: str) -> Any:
    """A checkpoint folder as a model; of dtype ``auto``, as it is stored."""
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=_attention(config),
        trust_remote_code=False,
        use_safetensors=True,
    )
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def _attention(config: Any) -> str | None:
    architecture = of_type(config.model_type)
    return None if architecture is None else architecture.attention_implementation
