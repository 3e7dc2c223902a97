"""Fits of tiny experts, and merges by gates written out component by component."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.components import fine_components, slices
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.models.pair import Pair, open_pair
from mergekit_wp.prompts import Sample
from tests.gating import Gates
from tests.joint_world import NAMES
from tests.models import DEVICE, EOS, LETTERS, with_eager_experts
from tests.test_scoring import Quiet


def fitted(
    world: Path,
    out: Path,
    names: tuple[str, ...] = NAMES,
    said: Quiet | None = None,
    **options: Any,
) -> Gates:
    settings: dict[str, Any] = {
        "recipe": world / "recipe.yml",
        "prompts": tuple((name, world / f"{name}.jsonl") for name in names),
        "out": out,
        "dtype": "float64",
        "device": DEVICE,
        "prompts_a_step": 2,
        "steps": 6,
        "granularity": "component",
        "shrinkage": 16.0,
        "unguarded": not options.get("guards"),
        **options,
    }
    fit(FitRequest(**settings), said or Quiet())
    return Gates.read(out, [name for name, _ in settings["prompts"]])


def load(folder: Path) -> PreTrainedModel:
    return with_eager_experts(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    )


def sequences(path: Path) -> list[Sample]:
    found = []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        answer = [*(LETTERS.index(c) for c in item["response"]), EOS]
        found.append(Sample(tuple(LETTERS.index(c) for c in item["prompt"]), tuple(answer)))
    return found


@torch.no_grad()
def divergence(model: PreTrainedModel, teacher: PreTrainedModel, path: Path) -> float:
    """Mean KL of the teacher's answers, one text at a time."""
    total = []
    for sample in sequences(path):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        at = slice(len(sample.prompt_ids) - 1, -1)
        want, have = (m(ids).logits[0, at].log_softmax(-1) for m in (teacher, model))
        total.append((want.exp() * (want - have)).sum(-1).mean())
    return float(torch.stack(total).mean())


def layout_of(world: Path) -> tuple[list[Pair], Layout]:
    """The pairs of a world, and where the gates of their components lie."""
    pairs = [open_pair(str(world / "base"), str(world / n), lambda *_: None) for n in NAMES]
    return pairs, Layout(pairs[0].partition, tuple(pair.changed for pair in pairs))


def merged(world: Path, layout: Layout, flat: torch.Tensor) -> PreTrainedModel:
    """B + sum of gate times difference, component by component."""
    model = load(world / "base")
    weights = dict(model.named_parameters())
    before = {name: w.clone() for name, w in weights.items()}
    with torch.no_grad():
        for name, own in zip(NAMES, layout.unflat(flat), strict=True):
            gates = layout.by_kind(own)
            theirs = dict(load(world / name).named_parameters())
            for component in fine_components(layout.partition):
                i = (
                    layout.partition.whole_tensors.index(component.name)
                    if component.kind == "tensor"
                    else (component.layer, component.index)
                )
                gate = float(gates[component.kind][i])
                for tensor, at in slices(layout.partition, component).items():
                    weights[tensor][at] += gate * (theirs[tensor][at] - before[tensor][at])
    return model


def merge(recipe: Path, out: Path) -> dict[str, torch.Tensor]:
    config = read_recipe(recipe).config
    run_merge(config, str(out), MergeOptions(write_model_card=False))
    return load_file(out / "model.safetensors")
