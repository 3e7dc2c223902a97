"""Whole models compute what scoring takes for granted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_wp.models.load import load_folder
from tests.models import CONFIGS, FAMILIES, make_model, save

torch.set_num_threads(1)


@pytest.mark.parametrize("family", [*CONFIGS, *FAMILIES])
def test_a_folder_computes_what_its_config_says(family: str, tmp_path: Path) -> None:
    """Gemma 2 caps its attention's logits, which not every attention of transformers does."""
    folder = save(make_model(family), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    found = load_folder(folder, "auto", "cpu")
    assert found.dtype == torch.float64 and not any(p.requires_grad for p in found.parameters())
    if hasattr(found, "set_experts_implementation"):
        found.set_experts_implementation("eager")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    # eager attention takes its softmax in float32
    torch.testing.assert_close(found(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
