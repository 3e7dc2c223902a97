"""The three experts: LoRA fine-tunes of the base, cached as adapters, merged into checkpoints.

``python -m benchmarks.smollm2.experts`` builds build/smollm2/experts/NAME from the adapters in
``adapters/``; ``--train`` fine-tunes anew and replaces the adapter.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.smollm2.generate import chat
from benchmarks.smollm2.paths import BASE, BUILD, REPO, device, read_jsonl
from benchmarks.smollm2.tasks import SKILLS
from benchmarks.smollm2.train import PROJECTIONS

ADAPTERS = REPO / "benchmarks" / "smollm2" / "adapters"
EXPERTS = BUILD / "experts"
RANK = 8
LR = 2e-3
# The committed adapters were trained with these steps and items a step: about the fewest that
# leave an expert 25 points or more above the base.
SETTINGS = {"instruction": (100, 12), "math": (160, 16), "code": (40, 16)}


def batch_of(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded ids, and which positions predict which response tokens."""
    ids, at, targets = [], [], []
    for i, row in enumerate(rows):
        prompt = tokenizer(chat(tokenizer, row["prompt"])).input_ids
        answer = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        ids.append(prompt + answer[:-1])
        at += [(i, len(prompt) - 1 + j) for j in range(len(answer))]
        targets += answer
    width = max(map(len, ids))
    padded = [x + [tokenizer.eos_token_id] * (width - len(x)) for x in ids]
    return {
        "ids": torch.tensor(padded),  # padding is on the right: causal attention never sees it
        "at": torch.tensor(at),
        "targets": torch.tensor(targets),
    }


def train(name: str, seed: int, data: Path, folder: Path) -> None:
    """Fine-tune the base on one skill and write the adapter to a folder."""
    torch.manual_seed(seed)
    steps, batch_size = SETTINGS[name]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).to(device())
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS)
    lora = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in lora.parameters() if p.requires_grad]
    exact = [p.detach().float().clone().requires_grad_() for p in trained]  # bf16 cannot add up lr
    optimizer = torch.optim.AdamW(exact, lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, (steps - step) / steps)
    )
    rows, rng = read_jsonl(data / f"{name}.jsonl"), random.Random(seed)
    decoder, head = model.model, model.lm_head
    for _ in (progress := trange(steps, desc=name, unit="step")):
        batch = {
            k: v.to(device()) for k, v in batch_of(tokenizer, rng.sample(rows, batch_size)).items()
        }
        hidden = decoder(input_ids=batch["ids"]).last_hidden_state
        logits = head(hidden[batch["at"][:, 0], batch["at"][:, 1]]).float()
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"])
        loss.backward()
        for ours, theirs in zip(exact, trained, strict=True):
            ours.grad, theirs.grad = theirs.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for ours, theirs in zip(exact, trained, strict=True):
                theirs.copy_(ours)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    lora.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    shutil.rmtree(folder, ignore_errors=True)
    lora.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def build(adapter: Path, out: Path) -> None:
    """Merge an adapter into the base: an ordinary checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    lora = PeftModel.from_pretrained(model, adapter)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lora.merge_and_unload().save_pretrained(partial)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


@click.command()
@click.option("--only", type=click.Choice(SKILLS), multiple=True, help="Only these experts.")
@click.option("--train", "anew", is_flag=True, help="Fine-tune instead of using the adapters.")
@click.option("--seed", default=0, show_default=True)
def main(only: tuple[str, ...], anew: bool, seed: int) -> None:
    """Build the experts' checkpoints from their adapters."""
    for name in only or SKILLS:
        if anew:
            train(name, seed, BUILD / "data", ADAPTERS / name)
        build(ADAPTERS / name, EXPERTS / name)
        click.echo(f"{EXPERTS / name}")


if __name__ == "__main__":
    main()
