"""Train the zoo: a weak base that knows of every skill, and one expert a skill.

Usage: ``python benchmarks/zoo/train.py --seed 0 --out benchmarks/zoo/checkpoints``
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.zoo.tasks import (
    CHARACTERS,
    EXPERT_SKILLS,
    SKILLS,
    Item,
    Skill,
    distinct_items,
    items,
    prompt_line,
)
from benchmarks.zoo.tokenizer import build_tokenizer, save_tokenizer

IGNORED = -100
N_PROMPTS = 128
N_EVAL = 200


@dataclass(frozen=True)
class Stage:
    """How one checkpoint is trained.

    ``mixture`` gives each skill its share of the items; ``followed`` is the share of a skill's
    items whose target is the answer: the others have the echo of a model that only copies.
    """

    steps: int
    learning_rate: float
    mixture: dict[Skill, float]
    followed: dict[Skill, float]
    batch_size: int = 64
    warmup: int = 50
    weight_decay: float = 0.01


BASE = Stage(
    steps=2200,
    learning_rate=3e-3,
    mixture={"copy": 0.1, "inst": 0.2, "math": 0.5, "sort": 0.2},
    followed={"copy": 1.0, "inst": 0.2, "math": 0.45, "sort": 0.3},
)
# Strong updates on purpose: mild ones (1e-3) merge well by plain averaging and test nothing.
EXPERTS: dict[Skill, Stage] = {
    "inst": Stage(steps=250, learning_rate=3e-3, mixture={"inst": 1.0}, followed={"inst": 1.0}),
    "math": Stage(steps=250, learning_rate=2e-3, mixture={"math": 1.0}, followed={"math": 1.0}),
    "sort": Stage(steps=250, learning_rate=3e-3, mixture={"sort": 1.0}, followed={"sort": 1.0}),
}


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of about 0.4 million parameters with grouped attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def training_pairs(stage: Stage, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, target) pairs of the train split in the stage's mixture."""
    rng = random.Random(seed)
    streams = {skill: items(skill, "train", seed) for skill in stage.mixture}
    skills, weights = list(stage.mixture), list(stage.mixture.values())
    while True:
        skill = rng.choices(skills, weights)[0]
        item: Item = next(streams[skill])
        followed = rng.random() < stage.followed[skill]
        yield item.prompt, item.answer if followed else item.echo


def collate(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and labels; only the target and its end of sequence are learned."""
    rows, labels = [], []
    for prompt, target in pairs:
        head = tokenizer(prompt).input_ids
        tail = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append(head + tail)
        labels.append([IGNORED] * len(head) + tail)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    )


def schedule(step: int, stage: Stage) -> float:
    """Return the learning-rate factor: a linear warm-up, then half a cosine down to 2%."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, name: str
) -> LlamaForCausalLM:
    """Train ``model`` in place, every weight of it, and return it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, stage))
    pairs = training_pairs(stage, seed)
    model.train()
    bar = trange(stage.steps, desc=name, mininterval=2)
    for step in bar:
        ids, labels = collate(tokenizer, [next(pairs) for _ in range(stage.batch_size)])
        # Padding is on the right and causal attention never looks right: no mask is needed.
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a copy of the model in bfloat16, and its tokenizer."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.max_new_tokens = 14
    copy.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def write_jsonl(path: Path, lines: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_data(out: Path, seed: int) -> None:
    """Write the scoring prompts (train split) and the evaluation questions (test split)."""
    for skill in EXPERT_SKILLS:
        items = distinct_items(skill, "train", seed + 1000, N_PROMPTS)
        write_jsonl(out / "prompts" / f"{skill}.jsonl", [prompt_line(item) for item in items])
    for skill in SKILLS:
        questions = distinct_items(skill, "test", seed, N_EVAL)
        write_jsonl(
            out / "eval" / f"{skill}.jsonl",
            [{"prompt": q.prompt, "answer": q.answer} for q in questions],
        )


@click.command(context_settings={"show_default": True})
@click.option("--seed", default=0, help="Seed of the weights and of every item.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--threads", default=1, help="CPU threads.")
def main(seed: int, out: Path, threads: int) -> None:
    """Train the base and its three experts, and write them with their data to OUT."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(CHARACTERS)
    base = train(new_model(tokenizer, seed), tokenizer, BASE, seed, "base")
    save_checkpoint(base, tokenizer, out / "base")
    for i, (skill, stage) in enumerate(EXPERTS.items(), start=1):
        # Start from the base as saved, so that nothing but the training separates the two.
        expert = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        train(expert, tokenizer, stage, seed + i, skill)
        save_checkpoint(expert, tokenizer, out / skill)
    write_data(out, seed)


if __name__ == "__main__":
    main()
