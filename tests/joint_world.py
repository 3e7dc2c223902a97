"""A base and two experts that want different answers, with prompts and a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import finetuned, make_model, save, with_eager_experts, write_prompts

NAMES = ("east", "west")


def write_task(path: Path, word: str) -> Path:
    """Prompts that all want the same answer."""
    prompts = write_prompts(path, 4)
    lines = [json.loads(line) | {"response": word} for line in prompts.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_recipe(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    models = [{"model": str(root / name)} for name in names]
    recipe = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return root


def make_world(family: str, root: Path) -> Path:
    """Everything of one architecture, in a folder."""
    base = make_model(family)
    save(base, root / "base")
    for name, word in zip(NAMES, ("abca", "dd"), strict=True):
        task = write_task(root / f"{name}.jsonl", word)
        save(finetuned(base, task), root / name)
    return write_recipe(root)


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return with_eager_experts(model)
