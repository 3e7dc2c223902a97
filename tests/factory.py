"""Objects made on the spot for tests."""

from __future__ import annotations

import torch

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.components import layout_of
from mergekit_wp.files.fit_section import Fit, Guard, Moment, Seen
from mergekit_wp.files.manifest import (
    Anchor,
    CompanyMember,
    Fidelity,
    Manifest,
    ModelId,
    Scale,
)
from mergekit_wp.files.scorefile import ScoreFile


def llama_tensor_names(n_layers: int) -> tuple[str, ...]:
    """Tensor names of a tied Llama."""
    per_layer = (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    )
    layers = [f"model.layers.{i}.{name}" for i in range(n_layers) for name in per_layer]
    return ("model.embed_tokens.weight", *layers, "model.norm.weight")


def make_score_file(
    *,
    dims: Dims | None = None,
    estimands: tuple[str, ...] = ("share", "gain"),
    criteria: tuple[str, ...] = ("kl",),
    kinds: tuple[str, ...] = ("layer", "tensor", "head", "kv_group", "neuron"),
    hidden_size: int = 16,
    seed: int = 0,
    delta_norm: dict[str, float] | None = None,
    company: tuple[CompanyMember, ...] | None = None,
    fit: Fit | None = None,
) -> ScoreFile:
    """A consistent score file with random scores."""
    dims = dims or Dims(n_layers=2, n_heads=4, n_kv_groups=2, n_neurons=6, architecture=LLAMA)
    names = tuple(delta_norm) if delta_norm else llama_tensor_names(dims.n_layers)
    assert all(layout_of(name, dims) for name in names)
    generator = torch.Generator().manual_seed(seed)
    model = ModelId(
        reference="somewhere", revision=None, config_hash="0" * 64, weights_dtype="float32"
    )
    manifest = Manifest(
        base=model,
        expert=model,
        behavior="test",
        n_prompts=4,
        responses="given",
        company=company,
        fit=fit,
        prompts_sha256="0" * 64,
        architecture="LlamaForCausalLM",
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        n_kv_groups=dims.n_kv_groups,
        n_neurons=dims.n_neurons,
        hidden_size=hidden_size,
        criteria=criteria,
        estimands=estimands,
        kinds=kinds,
        anchor=Anchor(layer=1, contrast="checkpoint", separation=1.0, n_contrasts=0)
        if "anchor" in criteria
        else None,
        scale={c: Scale(base=-1.0, expert=0.0) for c in criteria},
        fidelity={
            f"{e}/{c}/{k}": Fidelity(method="exact")
            for e in estimands
            for c in criteria
            for k in kinds
        },
        noise_floor=dict.fromkeys(criteria, 0.0),
        completeness={},
        tensor_names=names,
        dtype="float32",
        seed=seed,
        created="2026-01-01",
        versions={},
    )
    tensors = {
        key: (torch.rand if key.startswith("path/") else torch.randn)(
            manifest.shape(key.split("/")[2]), generator=generator
        )
        for key in manifest.score_keys()
    }
    norms = list(delta_norm.values()) if delta_norm else [1.0] * len(names)
    tensors["delta_norm"] = torch.tensor(norms, dtype=torch.float32)
    if "anchor" in criteria:
        tensors["anchor/vector"] = torch.randn(hidden_size, generator=generator)
    return ScoreFile(manifest, tensors)


def make_fit(*references: str) -> tuple[Fit, tuple[CompanyMember, ...]]:
    """What the files of experts that were fitted together say: how, and which experts."""
    company = tuple(
        CompanyMember(
            reference=reference, weights_sha256=f"{e}" * 64, behavior=f"behavior {e}", recovery=0.5
        )
        for e, reference in enumerate(references)
    )
    half = {member.behavior: Seen(kl=0.3, answers=0.5, tokens=0.75) for member in company}
    seen = half | {"plain": Seen(kl=0.01, answers=1.0, tokens=1.0)}
    fit = Fit(
        granularity="component",
        guards=(Guard(behavior="plain", prompts_sha256="0" * 64, n_prompts=2, price=0.25),),
        limit=1.05,
        start="0.5",
        rate=0.05,
        shrinkage=16.0,
        upper=1.5,
        prompts_a_step=2,
        done=True,
        best_step=1,
        held_out=dict.fromkeys(seen, 0),
        history=tuple(Moment(step=step, fitted=seen, judged=seen) for step in range(2)),
    )
    return fit, company
