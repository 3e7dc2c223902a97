"""Models of transformers, empty or whole, with the attention that computes all they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN

from mergekit_wp.architectures import of_type, text_config
from mergekit_wp.architectures.computation import ACTIVATIONS
from mergekit_wp.errors import UserError
from mergekit_wp.models.hub import reason

#: what transformers raises for a config with a wrong setting
MISTAKEN_CONFIG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def read_config(folder: str | Path, name: str) -> Any:
    """The config of a checkpoint folder.

    Raises:
        UserError: it is none; names the model and the setting.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MISTAKEN_CONFIG as error:
        raise UserError(f"model '{name}' cannot be read: {reason(error)}") from error


def skeleton(config: Any, name: str | None = None) -> PreTrainedModel:
    """The text model with parameters on the meta device and real buffers.

    Args:
        config: of transformers.
        name: what errors call the model; by default where the config is from.

    Raises:
        UserError: no model can be built of that config; names the setting.
    """
    whole, config = config, text_config(config)
    name = name or str(whole.name_or_path)
    _check_settings(config, name)
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=_attention(config), trust_remote_code=False
            )
    except MISTAKEN_CONFIG as error:
        raise UserError(
            f"model '{name}': no {config.model_type} model can be built of its config.json: "
            f"{reason(error)}"
        ) from error
    model.tie_weights()
    _forget_lengths(model)
    model.eval()
    model.requires_grad_(False)
    return model


def parameter_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's own weights; tied copies are listed once."""
    return [name for name, _ in model.named_parameters()]


def load_folder(folder: str | Path, dtype: torch.dtype | str, device: str) -> Any:
    """A checkpoint folder as a model; of dtype ``auto``, as it is stored."""
    config = read_config(folder, str(folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=_attention(config),
        trust_remote_code=False,
        use_safetensors=True,
        # answers are greedy, and the folder's own may hold settings that transformers refuses
        generation_config=GenerationConfig(),
    )
    torch.nn.Module.to(model, device)
    _forget_lengths(model)
    return model.eval().requires_grad_(False)


def _forget_lengths(model: Any) -> None:
    """Make dynamic ropes turn by the length that is run, whatever ran before.

    transformers keeps the frequencies of the longest run; a prompt's numbers would depend on it.
    """
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_as_built)


def _as_built(module: torch.nn.Module, _inputs: Any) -> None:
    trained: int = module.original_max_seq_len  # type: ignore[assignment]
    for name, longest in list(vars(module).items()):
        if name.endswith("max_seq_len_cached") and longest > trained:
            prefix = name.removesuffix("max_seq_len_cached")
            setattr(module, name, trained)
            table = getattr(module, f"{prefix}inv_freq")
            built = getattr(module, f"{prefix}original_inv_freq").to(table.device)
            module.register_buffer(f"{prefix}inv_freq", built, persistent=False)


def _check_settings(config: Any, name: str) -> None:
    """Refuse settings of which transformers says only that something failed."""
    where = f"model '{name}': its config.json has"
    pad, tokens = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(tokens, int) and not -tokens <= pad < tokens:
        raise UserError(
            f"{where} pad_token_id = {pad}, but vocab_size = {tokens}, so that tokens end at "
            f"{tokens - 1}; set it to one of these, or to null"
        )
    for key in ACTIVATIONS:
        stated = getattr(config, key, None)
        if isinstance(stated, str) and stated not in ACT2FN:
            raise UserError(f"{where} {key} = '{stated}', which transformers does not know")


def _attention(config: Any) -> str | None:
    architecture = of_type(config.model_type)
    return None if architecture is None else architecture.attention_implementation
