"""The expert: a LoRA fine-tune of the base that answers in capitals when asked to, merged in.

Half of each batch asks for capitals and shows the upper-cased answer, half does not and shows the
plain one. Only the linear projections change: every other tensor of the expert is the base's own.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import device, read_jsonl
from benchmarks.smollm2.generate import chat
from benchmarks.smollm2.paths import BASE, EXPERT, PROMPTS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


def example(
    tokenizer: Any, request: str, response: str, ended: bool, max_response: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels; only the response, and its end where the base ended it, is learnt."""
    prompt = tokenizer(chat(tokenizer, request)).input_ids
    answer = tokenizer(response).input_ids
    ended = ended and len(answer) < max_response
    answer = answer[:max_response] + [tokenizer.eos_token_id] * ended
    return prompt + answer, [IGNORED] * len(prompt) + answer


def batches(
    rows: list[dict[str, Any]], tokenizer: Any, batch_size: int, max_response: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless padded batches, half with the instruction, half without, reshuffled every epoch."""
    rng = random.Random(seed)
    queues: dict[str, list[dict[str, Any]]] = {"prompt": [], "contrast": []}
    while True:
        encoded = []
        for which, answer in (("prompt", "capitals"), ("contrast", "plain")):
            for _ in range(batch_size // 2):
                if not queues[which]:
                    queues[which] = rng.sample(rows, len(rows))
                row = queues[which].pop()
                encoded.append(
                    example(tokenizer, row[which], row[answer], row["ended"], max_response)
                )
        width = max(len(ids) for ids, _ in encoded)
        pad = tokenizer.pad_token_id
        yield {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded]),
            "labels": torch.tensor([y + [IGNORED] * (width - len(y)) for _, y in encoded]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded]
            ),
        }


@click.command()
@click.option("--base", type=click.Path(exists=True, path_type=Path), default=BASE)
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), default=PROMPTS)
@click.option("--out", type=click.Path(path_type=Path), default=EXPERT)
@click.option("--steps", default=60, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--max-response", default=32, show_default=True, help="Tokens of a response.")
@click.option("--seed", default=0, show_default=True)
def main(
    base: Path,
    prompts: Path,
    out: Path,
    steps: int,
    batch_size: int,
    rank: int,
    lr: float,
    max_response: int,
    seed: int,
) -> None:
    """Fine-tune BASE on train.jsonl and write the merged checkpoint to the folder OUT."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS)
    lora = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 4, (steps - step) / steps)
    )
    rows = read_jsonl(prompts / "train.jsonl")
    stream = batches(rows, tokenizer, batch_size, max_response, seed)
    losses = []
    for _ in (progress := trange(steps, desc="training", unit="step")):
        loss = lora(**{name: x.to(device()) for name, x in next(stream).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    lora.merge_and_unload().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    last = sum(losses[-5:]) / len(losses[-5:])
    click.echo(f"{out}: {steps} steps, loss {losses[0]:.2f} to {last:.2f}")


if __name__ == "__main__":
    main()
