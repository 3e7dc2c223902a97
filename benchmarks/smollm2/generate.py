"""Greedy answers from a checkpoint folder, batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import device, dtype


@dataclass(frozen=True)
class Answer:
    """The text of a response and whether the model ended it itself."""

    text: str
    ended: bool


def chat(tokenizer: Any, request: str) -> str:
    """A request in the model's chat format, up to where the response begins."""
    message = [{"role": "user", "content": request}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@torch.no_grad()
def generate(
    folder: Path,
    requests: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "answers",
) -> list[Answer]:
    """The model's greedy answers to single-turn requests, in their order."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype()).to(device()).eval()
    texts = [chat(tokenizer, request) for request in requests]
    # similar lengths together: less padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=label, unit="batch", leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True)
        out = model.generate(
            **batch.to(device()), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
        )
        for row, ids in zip(rows, out[:, batch.input_ids.shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers[row] = Answer(text, bool((ids == tokenizer.eos_token_id).any()))
    return [answers[i] for i in range(len(requests))]
