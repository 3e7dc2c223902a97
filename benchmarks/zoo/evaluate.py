"""Exact-match accuracy of checkpoints on the zoo's skills, by batched greedy generation.

Usage: ``python benchmarks/zoo/evaluate.py MODEL [MODEL ...] [--data FOLDER] [--json]``
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.zoo.tasks import SKILLS, is_correct

MAX_NEW_TOKENS = 14
DEFAULT_DATA = Path(__file__).parent / "checkpoints" / "eval"


def load_questions(path: Path) -> list[tuple[str, str]]:
    """Return the (prompt, answer) pairs of one JSONL file."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [(line["prompt"], line["answer"]) for line in lines]


def load_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a checkpoint in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Return each prompt's greedy continuation, cut at its end of sequence.

    Prompts of one length share a batch, so nothing is padded and no mask is needed. A
    continuation that never ends keeps a mark no answer has, so it is never correct.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
    texts = [""] * len(prompts)
    for length, members in by_length.items():
        ids = torch.tensor([encoded[i] for i in members], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(members, output[:, length:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
            texts[i] = tokenizer.decode(kept) + ("" if ended else "<unfinished>")
    return texts


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[tuple[str, str]]
) -> float:
    """Return the share of questions answered exactly."""
    texts = generate(model, tokenizer, [prompt for prompt, _ in questions])
    right = [is_correct(a, text) for (_, a), text in zip(questions, texts, strict=True)]
    return sum(right) / len(right)


def evaluate(folder: str | Path, data: str | Path = DEFAULT_DATA) -> dict[str, float]:
    """Return a checkpoint's accuracy on every skill that has a file in ``data``."""
    model, tokenizer = load_model(folder)
    files = {skill: Path(data) / f"{skill}.jsonl" for skill in SKILLS}
    return {
        skill: accuracy(model, tokenizer, load_questions(path))
        for skill, path in files.items()
        if path.exists()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the accuracies as a Markdown table: a row a model, a column a skill."""
    skills = list(next(iter(results.values())))
    lines = ["| model | " + " | ".join(skills) + " |", "|---|" + "---|" * len(skills)]
    for name, scores in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[s]:.3f}" for s in skills) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--data", default=str(DEFAULT_DATA), type=click.Path(exists=True), help="Questions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--threads", default=1, help="CPU threads; more do not pay for models this small.")
def main(models: tuple[str, ...], data: str, as_json: bool, threads: int) -> None:
    """Print the accuracy of each MODEL on each skill."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    results = {model: evaluate(model, data) for model in models}
    click.echo(json.dumps(results, indent=2) if as_json else table(results))


if __name__ == "__main__":
    main()
