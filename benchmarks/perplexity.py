"""What an expert or a merge costs in general: perplexity on plain text, beside the base's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

MAX_TOKENS = 96
RESAMPLES = 2000
REGISTERS = ("stories", "reports", "talk")
#: plain text of our own writing by register, a text a line
TEXTS = {name: Path(__file__).parent / "texts" / f"{name}.txt" for name in REGISTERS}


def registers() -> dict[str, list[str]]:
    """Texts by register. Nothing is fitted on them."""
    return {name: path.read_text().splitlines() for name, path in TEXTS.items()}


@torch.no_grad()
def surprise(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """Negative log-likelihood in nats and number of predicted tokens: ``[texts, 2]``.

    The first token of a text is given, at most ``MAX_TOKENS`` are read.
    """
    rows = []
    encoded = [tokenizer(text).input_ids[:MAX_TOKENS] for text in texts]
    for start in tqdm(range(0, len(encoded), batch_size), unit="batch", leave=False):
        batch = encoded[start : start + batch_size]
        width = max(map(len, batch))
        # padding is on the right: causal attention never sees it
        ids = torch.tensor([x + [0] * (width - len(x)) for x in batch], device=model.device)
        logs = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        nll = -logs.gather(-1, ids[:, 1:, None])[..., 0]
        rows += [(nll[i, : len(x) - 1].sum().item(), len(x) - 1) for i, x in enumerate(batch)]
    return np.array(rows)


def perplexity(rows: np.ndarray) -> np.ndarray:
    """exp(nats per token) of ``[..., texts, 2]``."""
    total = rows.sum(-2)
    return np.asarray(np.exp(total[..., 0] / total[..., 1]))


def ratio(rows: np.ndarray, first: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Perplexity relative to another model's on the same texts, with its 95% bootstrap interval."""
    chosen = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    draws = perplexity(rows[chosen]) / perplexity(first[chosen])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(perplexity(rows) / perplexity(first)), float(low), float(high)
