"""The material of benchmarks/merging merges by every recipe; its clock reads a real process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from benchmarks.merging import material
from benchmarks.merging.bench import Cost, best, measure, ratio
from mergekit_wp.autoload import ensure_registered

TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def test_every_recipe_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_registered()
    LoaderCache.loaders.clear()
    monkeypatch.setattr(material, "CONFIG", TINY)
    recipes = material.make(tmp_path / "material", torch.bfloat16)
    assert set(recipes) == {"ties", *material.RECIPES}
    merged = {}
    for name, path in recipes.items():
        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        run_merge(config, str(tmp_path / name), MergeOptions(quiet=True, copy_tokenizer=False))
        merged[name] = load_file(tmp_path / name / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    assert len({tuple(state[up].flatten().tolist()) for state in merged.values()}) == len(recipes)


def test_a_merge_is_measured_by_itself(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "x = bytearray(200 << 20)"]
    cost = measure(program, tmp_path / "recipe", tmp_path / "out", [])
    assert cost.peak > 200 and cost.cpu > 0 and cost.wall > 0
    with pytest.raises(SystemExit, match="failed"):
        measure([sys.executable, "-c", "1 / 0"], tmp_path / "recipe", tmp_path / "out", [])
    assert best([Cost(2, 1, 5), Cost(1, 3, 4)]) == Cost(1, 1, 4)


def test_ratios_are_of_the_best_and_of_every_repetition() -> None:
    ours, ties = [Cost(2, 1, 5), Cost(1, 3, 4)], [Cost(4, 1, 5), Cost(5, 4, 4)]
    assert ratio(ours, ties, "wall") == "0.25 (0.20 to 0.50)"
    assert ratio(ours, ties, "cpu") == "1.00 (0.75 to 1.00)"
