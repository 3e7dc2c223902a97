"""Gates files of tiny checkpoints, and a merge by them written out component by component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mergekit_wp.architectures import Dims
from mergekit_wp.components import Partition
from mergekit_wp.files import gatesfile
from mergekit_wp.files.gatesfile import GatesFile
from mergekit_wp.terms import FINE_KINDS
from tests.factory import make_gates_file
from tests.merging import Family, State, norms


def gate(family: Family, path: Path, value: float | None = None) -> GatesFile:
    """Write gates of a family's experts, for the weights that these have now; random or all one."""
    dims = Dims.from_config(family.config)
    file = make_gates_file(dims, len(family.experts))
    base = family.base.state
    dtypes = [str(c.state["model.norm.weight"].dtype) for c in (family.base, *family.experts)]
    ids = [
        file.manifest.base.model_copy(
            update={"reference": str(c.path), "weights_dtype": dtype.removeprefix("torch.")}
        )
        for c, dtype in zip((family.base, *family.experts), dtypes, strict=True)
    ]
    manifest = file.manifest.model_copy(
        update={
            "base": ids[0],
            "experts": tuple(
                expert.model_copy(update={"model": model})
                for expert, model in zip(file.manifest.experts, ids[1:], strict=True)
            ),
            "architecture": type(AutoModelForCausalLM.from_config(family.config)).__name__,
            "tensor_names": tuple(base),
            "hidden_size": family.config.hidden_size,
        }
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for e, expert in enumerate(family.experts):
        for kind in FINE_KINDS:
            gates = torch.rand(manifest.shape(kind), generator=generator)
            tensors[f"gate/{e}/{kind}"] = gates if value is None else gates.fill_(value)
        differences = norms(base, expert.state).values()
        tensors[f"delta_norm/{e}"] = torch.tensor(list(differences), dtype=torch.float32)
    file = replace(file, manifest=manifest, tensors=tensors)
    gatesfile.write(file, path)
    return file


def gated_recipe(family: Family, gates: Path, **top: Any) -> dict[str, Any]:
    """A recipe that merges a family by gates."""
    models = [{"model": str(expert.path)} for expert in family.experts]
    return family.recipe(models=models, parameters={"gates": str(gates)}) | top


def gated_merge(base: State, experts: Sequence[State], file: GatesFile, lam: float = 1.0) -> State:
    """The merge by its definition: base + λ Σ gate (expert − base), in float64."""
    partition = Partition(
        file.manifest.dims, {name: tuple(tensor.shape) for name, tensor in base.items()}
    )
    merged = {name: tensor.double() for name, tensor in base.items()}
    for component in partition.fine_components():
        whole = component.kind == "tensor"
        at = (
            (partition.whole_tensors.index(str(component.name)),)
            if whole
            else (component.layer, component.index)
        )
        for name, where in partition.slices(component).items():
            start = base[name][where].double()
            for e, expert in enumerate(experts):
                gate = float(file.gates(e)[component.kind][at])
                merged[name][where] += lam * gate * (expert[name][where].double() - start)
    return merged
