"""A reader of score files that was written from docs/file-format.md alone.

It knows nothing of mergekit-wp, and uses safetensors, json, hashlib and numpy.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

Array = NDArray[Any]
#: Llama's blocks: which dimension of which tensor belongs to which kind
CUTS = {
    "self_attn.q_proj": ("head", 0),
    "self_attn.o_proj": ("head", 1),
    "self_attn.k_proj": ("kv_group", 0),
    "self_attn.v_proj": ("kv_group", 0),
    "mlp.gate_proj": ("neuron", 0),
    "mlp.up_proj": ("neuron", 0),
    "mlp.down_proj": ("neuron", 1),
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest and tensors of a score file."""
    with safe_open(path, "np") as file:
        manifest = json.loads(file.metadata()["mergekit_wp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert manifest["format_version"] == 1
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes(manifest, tensors)
    for name, tensor in tensors.items():
        if name.endswith(".leads"):
            assert tensor.dtype == np.uint8 and (tensor <= 200).all(), name
            continue
        assert tensor.dtype == np.float32 and np.isfinite(tensor).all(), name
        if name == "delta_norm" or (name.startswith("path/") and not name.endswith(".se")):
            assert (tensor >= 0).all(), name
        if name.startswith("path/") and not name.endswith(".se"):
            upper = manifest["fit"]["upper"]
            if granularity(manifest) == "row_column" and not name.endswith("/row_column"):
                upper *= 2
            assert (tensor <= upper * (1 + 1e-6)).all(), name
    return manifest, tensors


def shapes(manifest: dict[str, Any], tensors: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    layers, names = manifest["n_layers"], manifest["tensor_names"]
    by_kind = {
        "layer": (layers,),
        "tensor": (len(names),),
        "head": (layers, manifest["n_heads"]),
        "kv_group": (layers, manifest["n_kv_groups"]),
        "neuron": (layers, manifest["n_neurons"]),
    }
    promised: dict[str, tuple[int, ...]] = {}
    for estimand in manifest["estimands"]:
        for criterion in manifest["criteria"]:
            for kind in manifest["kinds"]:
                name = f"{estimand}/{criterion}/{kind}"
                promised[name] = by_kind[kind]
                for beside in (f"{name}.se", f"{name}.leads"):
                    if beside in tensors:
                        promised[beside] = by_kind[kind]
    if (finest := granularity(manifest)) != "component":
        count = sum(n for _, n in gate_counts(manifest))
        promised[f"path/kl/{finest}"] = (count,)
    promised["delta_norm"] = (len(names),)
    if manifest["anchor"] is not None:
        promised["anchor/vector"] = (manifest["hidden_size"],)
    return promised


def place(name: str) -> tuple[int, str, int] | None:
    """Layer, kind and dimension of a tensor that is cut into blocks."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.\w+)\.(weight|bias)", name)
    if match is None or match[2] not in CUTS:
        return None
    kind, dimension = CUTS[match[2]]
    return None if match[3] == "bias" and dimension == 1 else (int(match[1]), kind, dimension)


def granularity(manifest: dict[str, Any]) -> str:
    return str(manifest["fit"]["granularity"]) if "fit" in manifest else "component"


def gate_counts(manifest: dict[str, Any]) -> list[tuple[int, int]]:
    """Of a file with channels: over which dimension of every tensor its gates lie, how many."""
    assert granularity(manifest) == "channel"
    found = []
    for name, shape in zip(manifest["tensor_names"], manifest["tensor_shapes"], strict=True):
        cut = place(name)
        dimension = len(shape) - 1 if cut is None else cut[2]
        found.append((dimension, shape[dimension]))
    return found


def channels(manifest: dict[str, Any], tensors: dict[str, Array]) -> dict[str, Array]:
    """Every tensor's gates, in a shape that broadcasts to it."""
    found, start = {}, 0
    for i, (dimension, count) in enumerate(gate_counts(manifest)):
        own = tensors["path/kl/channel"][start : start + count]
        start += count
        last = dimension == len(manifest["tensor_shapes"][i]) - 1
        found[manifest["tensor_names"][i]] = own if last else own[:, None]
    return found


def fine(manifest: dict[str, Any], values: dict[str, Array]) -> dict[str, Array]:
    """Values by kind; under `tensor` of those that are components by themselves only."""
    alone = [place(name) is None for name in manifest["tensor_names"]]
    return values | {"tensor": values["tensor"][np.array(alone)]}


def gate_of(manifest: dict[str, Any], gates: dict[str, Array], name: str, shape: Any) -> Array:
    """One tensor's gates, in a shape that broadcasts to it; by kind, or by tensor."""
    by_tensor = gates.get(name)
    if by_tensor is not None:
        return by_tensor
    found = place(name)
    if found is None:
        alone = [n for n in manifest["tensor_names"] if place(n) is None]
        return gates["tensor"][alone.index(name)]
    layer, kind, dimension = found
    row = gates[kind][layer]
    spread = np.repeat(row, shape[dimension] // len(row))
    return spread if dimension == len(shape) - 1 else spread[:, None]


def belongs(manifest: dict[str, Any], norms: Array, base: Path, expert: Path) -> bool:
    """Whether base and expert, stored as they were scored, are the file's models."""
    ours, theirs = (load_file(model / "model.safetensors") for model in (base, expert))
    for name, norm in zip(manifest["tensor_names"], norms, strict=True):
        found = np.linalg.norm(theirs[name].astype("f8") - ours[name].astype("f8"))
        if abs(found - norm) > 0.02 * norm:
            return False
    return True


def weights_sha256(model: Path) -> str:
    digests = [hashlib.sha256(f.read_bytes()) for f in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def merged(
    manifest: dict[str, Any], gates: list[dict[str, Array]], base: Path, experts: list[Path]
) -> dict[str, Array]:
    weights = load_file(base / "model.safetensors")
    deltas = [load_file(expert / "model.safetensors") for expert in experts]
    return {
        name: weight
        + sum(
            gate_of(manifest, g, name, weight.shape) * (delta[name] - weight)
            for g, delta in zip(gates, deltas, strict=True)
        )
        for name, weight in weights.items()
    }


def scores(tensors: dict[str, Array], which: str) -> dict[str, Array]:
    return {kind: tensors[f"{which}/{kind}"] for kind in ("head", "kv_group", "neuron", "tensor")}


def share_gates(files: list[dict[str, Array]], power: float) -> list[dict[str, Array]]:
    raised = []
    for own in files:
        total = sum(np.maximum(part, 0).astype("f8").sum() for part in own.values())
        raised.append({kind: (np.maximum(p, 0) / total) ** power for kind, p in own.items()})
    sums = {kind: sum(own[kind] for own in raised) for kind in raised[0]}
    return [{k: p / np.where(sums[k] > 0, sums[k], 1) for k, p in own.items()} for own in raised]
