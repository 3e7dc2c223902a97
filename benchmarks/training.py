"""Experts of a base: fine-tuned by LoRA or in full, on the responses to prompts.

Activations are in bfloat16, or in float32 on a CPU that would only emulate that; the weights that
are trained add up in float32. Logits are computed where a response is predicted, and nowhere else.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import device, dtype
from mergekit_wp.models.encoding import encode_pair

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: steps between looks at the validation items
LOOK = 15


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained.

    Attributes:
        steps: at most so many; the rate falls evenly to 0 at the last.
        batch_size: items a step.
        rate: AdamW's.
        rank: of the LoRA on all projections; None for every weight of the model.
    """

    steps: int
    batch_size: int
    rate: float
    rank: int | None = None


def batch_of(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded ids, and which positions predict which response tokens."""
    ids, at, targets = [], [], []
    for i, row in enumerate(rows):
        prompt, answer, _ = encode_pair(tokenizer, row["prompt"], row["response"])
        ids.append(prompt + answer[:-1])
        at += [(i, len(prompt) - 1 + j) for j in range(len(answer))]
        targets += answer
    width = max(map(len, ids))
    padded = [x + [tokenizer.eos_token_id] * (width - len(x)) for x in ids]
    return {
        "ids": torch.tensor(padded, device=device()),  # causal attention never sees what pads
        "at": torch.tensor(at, device=device()),
        "targets": torch.tensor(targets, device=device()),
    }


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[targets, vocabulary]``, in the model's dtype."""
    hidden = model.model(input_ids=batch["ids"]).last_hidden_state
    return model.lm_head(hidden[batch["at"][:, 0], batch["at"][:, 1]])  # type: ignore[no-any-return]


@torch.no_grad()
def reproduced(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of responses whose every token the model finds likeliest behind those before."""
    batch = batch_of(tokenizer, rows)
    wrong = batch["at"][logits_of(model, batch).argmax(-1) != batch["targets"], 0]
    return 1 - len(set(wrong.tolist())) / len(rows)


def train(
    base: Path,
    rows: Sequence[dict[str, Any]],
    valid: Sequence[dict[str, Any]],
    recipe: Recipe,
    seed: int,
    name: str,
) -> tuple[Any, list[torch.Tensor]]:
    """Fine-tune until the validation responses are reproduced at two looks in a row.

    Args:
        base: a checkpoint.
        rows: prompts and responses to learn.
        valid: likewise, to stop by; with none, all steps are taken.
        recipe: how.
        seed: of the first LoRA weights and of the order.
        name: shown.

    Returns:
        The model (of peft where LoRA was trained), and its trained parameters in float32.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype()).to(device())
    tuned = model
    if recipe.rank is not None:
        config = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=PROJECTIONS)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    exact = [p.detach().float().clone().requires_grad_() for p in trained]  # bf16 cannot add up
    optimizer = torch.optim.AdamW(exact, lr=recipe.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, (recipe.steps - step) / recipe.steps)
    )
    right = 0.0
    for step in (progress := trange(recipe.steps, desc=name, unit="step")):
        batch = batch_of(tokenizer, rng.sample(rows, recipe.batch_size))
        loss = torch.nn.functional.cross_entropy(logits_of(model, batch).float(), batch["targets"])
        loss.backward()
        for ours, theirs in zip(exact, trained, strict=True):
            ours.grad, theirs.grad = theirs.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for ours, theirs in zip(exact, trained, strict=True):
                theirs.copy_(ours)
        shown = {"loss": f"{loss.item():.3f}"}
        if valid and (step + 1) % LOOK == 0:
            before, right = right, reproduced(model, tokenizer, valid)
            shown["reproduced"] = f"{right:.2f}"
            if before == right == 1:
                break
        progress.set_postfix(shown)
    progress.close()
    return tuned, exact


def save_adapter(lora: Any, folder: Path, base_name: str) -> None:
    """Write a trained adapter as peft does."""
    lora.peft_config["default"].base_model_name_or_path = base_name
    shutil.rmtree(folder, ignore_errors=True)
    lora.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def merge_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Merge an adapter into its base: an ordinary checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save(PeftModel.from_pretrained(model, adapter).merge_and_unload(), base, out)


def save_full(model: Any, exact: Sequence[torch.Tensor], base: Path, out: Path) -> None:
    """Write a model that was trained in full, with its weights in float32."""
    model = model.float()
    with torch.no_grad():
        for theirs, ours in zip(model.parameters(), exact, strict=True):
            theirs.copy_(ours)
    save(model, base, out)


def save(model: Any, base: Path, out: Path) -> None:
    """Write a checkpoint with its base's tokenizer, under its name only when complete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(base).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
