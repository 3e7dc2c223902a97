"""Fitted score files of tiny checkpoints, and a merge by them, component by component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.components import fine_components, slices
from mergekit_wp.architectures import Dims
from mergekit_wp.components import Partition
from mergekit_wp.files import scorefile
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.terms import Kind
from tests.factory import make_fit, make_score_file
from tests.merging import Family, State, norms


@dataclass(frozen=True)
class Gates:
    """The score files of experts that were fitted together."""

    files: tuple[ScoreFile, ...]

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Gates:
        return cls(tuple(scorefile.read(folder / f"{name}.safetensors") for name in names))

    @property
    def manifest(self) -> Manifest:
        """Of the first expert."""
        return self.files[0].manifest

    @property
    def fit(self) -> Fit:
        """The same in all files."""
        (found,) = {file.manifest.model_dump_json(include={"fit"}) for file in self.files}
        assert self.manifest.fit is not None and found
        return self.manifest.fit

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{e}/{k}": t for e, file in enumerate(self.files) for k, t in file.tensors.items()}

    def gates(self, expert: int) -> dict[Kind, torch.Tensor]:
        return self.files[expert].fine_scores("path", "kl")


def gate(family: Family, folder: Path, value: float | None = None) -> Gates:
    """Write gates of a family's experts, for the weights that these have now; random or all one."""
    base, files = family.base, []
    fit, company = make_fit(*(str(expert.path) for expert in family.experts))
    for e, expert in enumerate(family.experts):
        file = make_score_file(
            dims=Dims.from_config(family.config),
            estimands=("path",),
            hidden_size=family.config.hidden_size,
            seed=e,
            delta_norm=norms(base.state, expert.state),
            company=company,
            fit=fit,
        )
        ids = {
            side: file.manifest.base.model_copy(
                update={
                    "reference": str(checkpoint.path),
                    "weights_dtype": str(checkpoint.state["model.norm.weight"].dtype).split(".")[1],
                }
            )
            for side, checkpoint in (("base", base), ("expert", expert))
        }
        architecture = type(AutoModelForCausalLM.from_config(family.config)).__name__
        manifest = file.manifest.model_copy(update=ids | {"architecture": architecture})
        if value is not None:
            for key, tensor in file.tensors.items():
                if key.startswith("path/"):
                    tensor.fill_(value)
        files.append(replace(file, manifest=manifest))
        scorefile.write(files[-1], folder / f"{expert.path.name}.safetensors")
    return Gates(tuple(files))


def gated_recipe(family: Family, folder: Path, **top: Any) -> dict[str, Any]:
    """A recipe that merges a family by gates."""
    models = [
        {
            "model": str(expert.path),
            "parameters": {"scores": str(folder / f"{expert.path.name}.safetensors")},
        }
        for expert in family.experts
    ]
    return family.recipe(models=models, parameters={"fusion": "path"}) | top


def gated_merge(base: State, experts: Sequence[State], file: Gates, lam: float = 1.0) -> State:
    """The merge by its definition: base + λ Σ gate (expert − base), in float64."""
    partition = Partition(
        file.manifest.dims, {name: tuple(tensor.shape) for name, tensor in base.items()}
    )
    merged = {name: tensor.double() for name, tensor in base.items()}
    for component in fine_components(partition):
        whole = component.kind == "tensor"
        at = (
            (partition.whole_tensors.index(str(component.name)),)
            if whole
            else (component.layer, component.index)
        )
        for name, where in slices(partition, component).items():
            start = base[name][where].double()
            for e, expert in enumerate(experts):
                gate = float(file.gates(e)[component.kind][at])
                merged[name][where] += lam * gate * (expert[name][where].double() - start)
    return merged
