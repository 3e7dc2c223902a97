"""What scoring takes at most, measured in a process of its own: `python -m tests.peak FOLDER`.

Prints JSON: resident bytes when everything has been imported and used once, the peak of a run, the
peaks of one that offloads all weights and of one that holds the whole expert besides, and what the
run stated itself.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_wp.models.memory import peak_memory
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import EOS, VOCABULARY, save_tokenizer, write_prompts
from tests.test_scoring import Quiet


def save_pair(folder: Path, hidden: int, layers: int) -> int:
    """Random models of given sizes; returns bytes of one of them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "expert"):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * float(parameter.std()))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def run(folder: Path, name: str, max_memory: dict[str, int] | None = None) -> str:
    """One run of `score` by everything but single swaps of tensors; returns its note on memory."""
    said = Quiet()
    prompts = write_prompts(folder / "p.jsonl", 2)
    request = ScoreRequest(
        base=str(folder / "base"),
        expert=str(folder / "expert"),
        prompts=prompts,
        out=folder / f"{name}.safetensors",
        estimand=("share", "gain", "activation_gain"),
        kinds=("layer", "head", "kv_group", "neuron"),
        exact_budget=0.0,
        share_steps=1,
        verify=1,
        batch_size=2,
        max_new_tokens=2,
        device_map=None if max_memory is None else "auto",
        max_memory=max_memory,
    )
    score(request, said)
    return said.notes[-1]


def main(folder: Path) -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    run(folder / "small", "small")
    found: dict[str, object] = {}
    forget = partial(Path("/proc/self/clear_refs").write_text, "5")  # the peak is from now on
    forget()
    found["start"] = peak_memory()
    run(folder / "large", "offloaded", {"cpu": 0})
    found["offloaded"] = peak_memory()
    forget()
    found |= {"note": run(folder / "large", "large"), "peak": peak_memory()}
    held = []

    def holding(*args: Any) -> Pair:
        pair = open_pair(*args)
        held.extend(pair.expert.tensor(name, torch.float32) for name in pair.delta_norm)
        return pair

    with patch("mergekit_wp.runs.run.open_pair", holding):
        run(folder / "large", "held")
    found["holding"] = peak_memory()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
