"""Training of the benchmarks' experts: where responses are predicted, and what is learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.training import Recipe, batch_of, logits_of, reproduced, save_full, train
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.tasks.items import answers
from tests.models import make_model, save

ROWS = [{"prompt": "abc", "response": "de"}, {"prompt": "b", "response": "fgh"}]


def test_logits_are_those_of_each_text_alone(tmp_path: Path) -> None:
    model = make_model("llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(save(model, tmp_path / "base"))
    batch = batch_of(tokenizer, ROWS)
    expected, targets = [], []
    for row in ROWS:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        expected.append(logits[len(prompt) - 1 : -1])
        targets += answer
    assert batch["targets"].tolist() == targets
    torch.testing.assert_close(logits_of(model, batch), torch.cat(expected))


def test_a_full_expert_learns_and_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    base = save(make_model("llama"), tmp_path / "base", torch.float32)
    recipe = Recipe(steps=90, batch_size=2, rate=3e-3)
    model, exact = train(base, ROWS, ROWS, recipe, seed=0, name="full")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert reproduced(model, tokenizer, ROWS) == 1
    save_full(model, exact, base, tmp_path / "expert")
    read = type(model).from_pretrained(tmp_path / "expert", dtype=torch.float32)
    for ours, theirs in zip(exact, read.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=0)
    asked = TextInterface.of(tmp_path / "expert", tokenizer)
    found = answers(read, asked, [row["prompt"] for row in ROWS], [6, 6])
    assert [text for text, _ in found] == [row["response"] for row in ROWS]
