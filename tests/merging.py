"""Tiny checkpoints with fitting score files, and a merge written out component by component."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.components import components, fine_components, slices
from mergekit_wp.architectures import Dims
from mergekit_wp.components import Partition
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging.method import weight_patching
from tests.factory import make_score_file

State = dict[str, torch.Tensor]
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama_config(tied: bool = True, **changes: int) -> PretrainedConfig:
    return LlamaConfig(**(SIZES | changes), tie_word_embeddings=tied)


def qwen_config(tied: bool = False) -> PretrainedConfig:
    return Qwen2Config(**SIZES, tie_word_embeddings=tied)


@dataclass
class Checkpoint:
    """A saved model and the tensors in it."""

    path: Path
    state: State

    @classmethod
    def save(
        cls, path: Path, config: PretrainedConfig, state: State, dtype: torch.dtype
    ) -> Checkpoint:
        model = AutoModelForCausalLM.from_config(config)
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        model.load_state_dict(state, strict=False)
        model.to(dtype).save_pretrained(path)
        return cls(path, state)


def random_state(config: PretrainedConfig, seed: int, spread: float = 1.0) -> State:
    """Normal numbers in the shape of every stored tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {
        name: spread * torch.randn(tensor.shape, generator=generator)
        for name, tensor in shapes.items()
    }


def add(state: State, delta: State) -> State:
    return {name: tensor + delta[name] for name, tensor in state.items()}


def norms(base: State, expert: State) -> dict[str, float]:
    return {name: float((expert[name].double() - base[name].double()).norm()) for name in base}


def scores_for(
    base: State, expert: State, config: PretrainedConfig, seed: int = 0, **options: object
) -> ScoreFile:
    """Random scores with the delta norms of these checkpoints."""
    options.setdefault("delta_norm", norms(base, expert))
    file = make_score_file(
        dims=Dims.from_config(config), hidden_size=config.hidden_size, seed=seed, **options
    )
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]
    dtype = str(base["model.norm.weight"].dtype).removeprefix("torch.")
    model = file.manifest.base.model_copy(update={"weights_dtype": dtype})
    update = {"architecture": architecture, "base": model, "expert": model}
    return replace(file, manifest=file.manifest.model_copy(update=update))


@dataclass
class Family:
    """A base, its experts, and their score files on disk."""

    config: PretrainedConfig
    base: Checkpoint
    experts: list[Checkpoint]
    files: list[ScoreFile]
    paths: list[Path]

    @classmethod
    def make(
        cls,
        folder: Path,
        config: PretrainedConfig,
        n_experts: int = 2,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> Family:
        start = random_state(config, 100)
        base = Checkpoint.save(folder / "base", config, start, dtype)
        family = cls(config, base, [], [], [])
        for e in range(n_experts):
            state = add(start, random_state(config, e, 0.1))
            expert = Checkpoint.save(folder / f"expert{e}", config, state, dtype)
            file = scores_for(base.state, expert.state, config, seed=e, **options)
            path = folder / "scores" / f"expert{e}.safetensors"
            scorefile.write(file, path)
            family.experts.append(expert)
            family.files.append(file)
            family.paths.append(path)
        return family

    def recipe(self, *per_expert: dict[str, object], **top: object) -> dict[str, object]:
        """A weight-patching recipe; ``per_expert`` adds to each expert's parameters."""
        extra = per_expert or ({},) * len(self.experts)
        models = [
            {"model": str(expert.path), "parameters": {"scores": str(path)} | more}
            for expert, path, more in zip(self.experts, self.paths, extra, strict=True)
        ]
        return {
            "merge_method": "weight_patching",
            "base_model": str(self.base.path),
            "models": models,
            "dtype": "float32",
        } | top


def by_mergekit(recipe: dict[str, Any], out: Path, **options: Any) -> State:
    """What mergekit makes of a recipe."""
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, **options))
    return load_file(out / "model.safetensors")


def reference(
    base: State,
    experts: list[State],
    files: list[ScoreFile],
    *,
    weights: list[float] | None = None,
    densities: list[float] | None = None,
    fusion: str = "share",
    power: float = 0.5,
    lam: float = 1.0,
    estimand: str = "share",
    criterion: str = "kl",
    granularity: str = "component",
) -> State:
    """The merge by its definition: one component after the other, in float64."""
    n = len(experts)
    weights, densities = weights or [1.0] * n, densities or [1.0] * n
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    partition = Partition(files[0].manifest.dims, shapes)
    fine = granularity == "component"
    parts = list(fine_components(partition) if fine else components(partition, "tensor"))
    tables = []
    for file, density in zip(files, densities, strict=True):
        raw = []
        for part in parts:
            values = file.tensors[f"{estimand}/{criterion}/{part.kind}"]
            sliced = part.kind != "tensor"
            raw.append(float(values[part.layer, part.index] if sliced else values[part.index]))
        total = sum(value for value in raw if value > 0)
        best = sorted(range(len(raw)), key=lambda c: -raw[c])
        kept = set(best[: max(1, int(density * len(raw))) if density else 0])
        tables.append([v / total if c in kept else 0.0 for c, v in enumerate(raw)])
    merged = {name: tensor.double() for name, tensor in base.items()}
    for c, part in enumerate(parts):
        s = [max(table[c], 0.0) for table in tables]
        if fusion == "share":
            a = [x**power if x > 0 else 0.0 for x in s]
            gates = [w * x / sum(a) if sum(a) else 0.0 for w, x in zip(weights, a, strict=True)]
        elif fusion == "winner":
            gates = [
                w if x and e == s.index(max(s)) else 0.0
                for e, (w, x) in enumerate(zip(weights, s, strict=True))
            ]
        else:
            gates = [w if x else 0.0 for w, x in zip(weights, s, strict=True)]
        for name, where in slices(partition, part).items():
            start = base[name][where].double()
            deltas = [expert[name][where].double() - start for expert in experts]
            merged[name][where] = start + lam * sum(
                g * d for g, d in zip(gates, deltas, strict=True)
            )
    return merged


def direct(family: Family, **parameters: Any) -> State:
    """Merge in memory, as a notebook would."""
    models = {"base": family.base.state} | {
        str(e): expert.state for e, expert in enumerate(family.experts)
    }
    scores = {str(e): str(path) for e, path in enumerate(family.paths)}
    return merge_state_dicts(
        models, weight_patching, base="base", parameters={"scores": scores} | parameters
    )


def states(family: Family) -> list[State]:
    return [expert.state for expert in family.experts]


def assert_merged(merged: State, expected: State, rtol: float = 1e-6) -> None:
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=rtol, atol=rtol, msg=name)
