"""Three experts in the shape of SmolLM2-135M, with random weights and scores."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from mergekit_wp.architectures import Dims
from mergekit_wp.files import scorefile
from mergekit_wp.files.fit_section import Fit, Moment, Seen
from mergekit_wp.files.manifest import CompanyMember, Fidelity, Manifest, ModelId
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging.fusion import delta_norm
from mergekit_wp.terms import Estimand, GateGranularity, Kind

NAMES = ("instruction", "math", "code")
#: SmolLM2-135M
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
KINDS: tuple[Kind, ...] = ("tensor", "head", "kv_group", "neuron")
#: by the name of a recipe its fusion, and what each of the fitted gates covers
RECIPES: dict[str, tuple[str, GateGranularity | None]] = {
    "share": ("share", None),
    "gate": ("gate", None),
    "path": ("path", "component"),
    "path, channel": ("path", "channel"),
    "path, row and column": ("path", "row_column"),
}


def make(folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    """Checkpoints, score files, and a recipe of each method.

    Returns:
        The recipes by name.
    """
    config = LlamaConfig(**CONFIG)
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    generator = torch.Generator().manual_seed(0)

    def weights(spread: float) -> dict[str, torch.Tensor]:
        return {n: spread * torch.randn(s, generator=generator) for n, s in shapes.items()}

    def saved(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (folder / name).mkdir(parents=True)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        rounded = {n: t.to(dtype) for n, t in tensors.items()}
        save_file(rounded, folder / name / "model.safetensors", metadata={"format": "pt"})
        return rounded

    exact = weights(0.05)
    base = saved("base", exact)
    norms = []
    for name in NAMES:
        moved = {n: t + d for (n, t), d in zip(exact.items(), weights(0.005).values(), strict=True)}
        expert = saved(name, moved)
        norms.append({n: delta_norm(base[n], expert[n]) for n in base})
    dims, stored = Dims.from_config(config), str(dtype).removeprefix("torch.")
    sizes = {n: tuple(shape) for n, shape in shapes.items()}
    for e, name in enumerate(NAMES):
        for gates in {gates for _, gates in RECIPES.values()}:
            file = _scores(name, dims, norms[e], stored, generator, gates, sizes)
            scorefile.write(file, folder / str(gates) / f"{name}.safetensors")
    return {name: _recipe(folder, name, stored) for name in ("ties", *RECIPES)}


def _model(name: str, stored: str) -> ModelId:
    return ModelId(reference=name, revision=None, config_hash="0" * 64, weights_dtype=stored)


def _scores(
    name: str,
    dims: Dims,
    norms: dict[str, float],
    stored: str,
    generator: torch.Generator,
    gates: GateGranularity | None,
    shapes: dict[str, tuple[int, ...]],
) -> ScoreFile:
    together = gates is not None
    estimand: Estimand = "path" if together else "share"
    company = [
        CompanyMember(reference=name, weights_sha256="0" * 64, behavior=name, recovery=1.0)
        for name in NAMES
    ]
    seen = dict.fromkeys(NAMES, Seen(kl=0.0, answers=1.0, tokens=1.0))
    fit = Fit(
        granularity=gates or "component",
        guards=(),
        limit=None,
        start="0.5",
        rate=0.05,
        shrinkage=16.0,
        upper=1.0,
        prompts_a_step=1,
        held_out=dict.fromkeys(NAMES, 0),
        done=False,
        best_step=0,
        history=(Moment(step=0, fitted=None, judged=seen),),
    )
    manifest = Manifest(
        base=_model("base", stored),
        expert=_model(name, stored),
        behavior=name,
        n_prompts=1,
        prompts_sha256="0" * 64,
        responses="given",
        architecture="LlamaForCausalLM",
        **dims.numbers,
        hidden_size=CONFIG["hidden_size"],
        criteria=("kl",),
        estimands=(estimand,),
        kinds=KINDS,
        anchor=None,
        scale={},
        fidelity={f"{estimand}/kl/{kind}": Fidelity(method="exact") for kind in KINDS},
        noise_floor={},
        completeness={},
        tensor_names=tuple(norms),
        tensor_shapes=None if gates in (None, "component") else tuple(shapes[n] for n in norms),
        company=tuple(company) if together else None,
        fit=fit if together else None,
        dtype="float32",
        seed=0,
        created="2026-01-01",
        versions={},
    )
    wanted = {key: manifest.shape(key.split("/")[2]) for key in manifest.score_keys()}
    wanted |= manifest.finer_shapes
    tensors = {key: torch.randn(size, generator=generator) for key, size in wanted.items()}
    if together:
        tensors = {key: value.clamp(0, 1) for key, value in tensors.items()}
    tensors["delta_norm"] = torch.tensor(list(norms.values()))
    return ScoreFile(manifest, tensors)


def _recipe(folder: Path, name: str, stored: str) -> Path:
    parameters: list[dict[str, object]] = [{"weight": 1.0, "density": 0.5} for _ in NAMES]
    recipe: dict[str, object] = {"merge_method": "ties"}
    if name != "ties":
        fusion, gates = RECIPES[name]
        recipe = {"merge_method": "weight_patching", "parameters": {"fusion": fusion}}
        scores = folder / str(gates)
        parameters = [{"scores": str(scores / f"{n}.safetensors")} for n in NAMES]
    models = [
        {"model": str(folder / n), "parameters": own}
        for n, own in zip(NAMES, parameters, strict=True)
    ]
    recipe |= {"base_model": str(folder / "base"), "models": models, "dtype": stored}
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
