"""A GGUF file as an ordinary checkpoint folder.

transformers dequantises GGUF files, but refuses to save them; so the weights are copied into a
plain model of the same class. They are kept in float32: an expert's small changes would drown in
bfloat16's rounding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def convert(folder: Path, gguf: str, out: Path, **config: Any) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary checkpoint folder.

    Args:
        folder: where the file lies.
        gguf: its name.
        out: the folder to write.
        config: values of the model's configuration that the file does not give right.
    """
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    values = source.config.to_dict() | config
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    model = type(source)(type(source.config).from_dict(values)).to(torch.float32)
    model.load_state_dict(source.state_dict())
    model.tie_weights()

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
