"""Perplexity on plain text, against a token-by-token reference."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.items import split_of
from benchmarks.perplexity import MAX_TOKENS, perplexity, ratio, surprise
from benchmarks.smollm2.ifeval import identity, request_of
from benchmarks.smollm2.perplexity import plain_texts
from tests.models import make_model


def tokenizer(text: str) -> Any:
    return SimpleNamespace(input_ids=[ord(letter) % 31 for letter in text])


def test_surprise_against_one_text_and_token_at_a_time() -> None:
    model = make_model("llama").eval()
    texts = ["abcdef", "ghi", "x" * (MAX_TOKENS + 20)]
    found = surprise(model, tokenizer, texts, batch_size=2)
    for text, (nats, count) in zip(texts, found, strict=True):
        ids = tokenizer(text).input_ids[:MAX_TOKENS]
        expected = 0.0
        for i in range(1, len(ids)):
            with torch.no_grad():
                last = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double()
            expected -= last.log_softmax(-1)[ids[i]].item()
        assert count == len(ids) - 1
        assert nats == pytest.approx(expected, rel=1e-4)


def test_perplexity_weighs_tokens_not_texts() -> None:
    rows = np.array([[2 * math.log(4), 2], [math.log(2), 4]])
    assert perplexity(rows) == pytest.approx(math.exp((2 * math.log(4) + math.log(2)) / 6))


def test_ratio_is_one_with_itself_and_sees_a_shift() -> None:
    rng = np.random.default_rng(0)
    first = np.stack([rng.uniform(50, 150, 40), np.full(40, 50.0)], -1)
    assert ratio(first, first) == pytest.approx((1, 1, 1))
    worse = first + np.array([50 * math.log(2), 0])
    assert ratio(worse, first) == pytest.approx((2, 2, 2))


def test_plain_texts_leave_out_what_experts_learnt() -> None:
    def row(i: int, *names: str) -> dict[str, Any]:
        return {"prompt": f"Write a tale about dog {i}.", "instruction_id_list": list(names)}

    rows = [row(i, "length_constraints:number_words") for i in range(100)]
    rows += [row(i, "punctuation:no_comma") for i in range(100, 200)]
    rows += [row(i, "language:response_language") for i in range(200, 300)]
    rows += [{"prompt": "The sun, a star.", "instruction_id_list": ["x:y"]}]  # no request in it
    texts = plain_texts(rows, 1000)
    assert "The sun, a star." in texts
    numbers = {int(text.split()[-1][:-1]) for text in texts if text.startswith("Write")}
    assert numbers and max(numbers) < 100
    for text in texts:
        request = request_of(text)
        assert request is None or split_of(identity(request)) in ("valid", "test")
    assert plain_texts(rows[::-1], 5) == texts[:5], "the order of the file does not matter"
