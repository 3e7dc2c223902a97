"""What an expert or a merge costs in general: perplexity on plain text, beside the base's.

The text are IFEval's prompts themselves, read as running text without the chat format: written by
people, on many subjects, at hand offline. Prompts that ask for one of the six constraints are left
out, and so are those whose request an expert was trained or scored on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.smollm2.ifeval import identity, request_of
from benchmarks.smollm2.paths import IFEVAL, device, read_jsonl
from benchmarks.smollm2.skills.item import split_of
from mergekit_wp.tasks.ifeval import RULES

TEXTS = 96
MAX_TOKENS = 96
RESAMPLES = 2000


def plain_texts(rows: Sequence[dict[str, Any]], count: int = TEXTS) -> list[str]:
    """The ``count`` longest usable prompts; equal lengths in the order of their hashes.

    Args:
        rows: IFEval's prompts with their ``instruction_id_list``.
        count: at most so many.
    """
    usable = set()
    for row in rows:
        names = row["instruction_id_list"]
        request = request_of(row["prompt"])
        learnt = request is not None and split_of(identity(request)) in ("train", "score")
        foreign = any(name.startswith("language:") for name in names)
        if not (learnt or foreign or RULES.keys() & set(names)):
            usable.add(row["prompt"].strip())
    ordered = sorted(usable, key=lambda t: (-len(t), hashlib.sha256(t.encode()).hexdigest()))
    return ordered[:count]


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


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--ifeval", type=click.Path(exists=True, path_type=Path), default=IFEVAL)
@click.option("--texts", default=TEXTS, show_default=True, help="At most so many.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write each text's.")
def main(folders: tuple[Path, ...], ifeval: Path, texts: int, dtype: str, out: Path | None) -> None:
    """Print the perplexity of the model FOLDERS, the base first."""
    chosen = plain_texts(read_jsonl(ifeval), texts)
    if not chosen:
        raise click.ClickException(f"{ifeval} holds no prompt without the six constraints")
    found: dict[str, np.ndarray] = {}
    click.echo(f"{'model':<34} perplexity  against the first, 95% interval")
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        rows = found[str(folder)] = surprise(model.to(device()).eval(), tokenizer, chosen)
        line = f"{folder!s:<34} {perplexity(rows):<10.2f}"
        if len(found) > 1:
            value, low, high = ratio(rows, next(iter(found.values())))
            line += f"  x {value:.2f} [{low:.2f}, {high:.2f}]"
        click.echo(line.rstrip())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({name: rows.tolist() for name, rows in found.items()}))


if __name__ == "__main__":
    main()
