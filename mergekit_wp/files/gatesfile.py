"""The gates file: fitted component gates of several experts, a sibling of the score file.

One safetensors file: a JSON manifest under the metadata key ``mergekit_wp_gates``, tensors
``gate/<expert>/<kind>`` (float32: ``head`` [layers, heads], ``kv_group`` [layers, groups],
``neuron`` [layers, neurons], ``tensor`` [tensors that are components by themselves]) and
``delta_norm/<expert>`` [tensors], experts by their position in the manifest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mergekit_wp.architectures import Dims
from mergekit_wp.components import layout_of
from mergekit_wp.errors import UserError
from mergekit_wp.files import container
from mergekit_wp.files.scorefile import CompanyMember, Fidelity, Manifest, ModelId, ScoreFile
from mergekit_wp.files.scorefile import check as check_scores
from mergekit_wp.files.untrusted import complaint, parse_json
from mergekit_wp.terms import FINE_KINDS, Kind

GATES_KEY = "mergekit_wp_gates"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GatedExpert(_Strict):
    """One expert and the behaviour it was the teacher of."""

    model: ModelId
    weights_sha256: str
    behavior: str
    prompts_sha256: str
    n_prompts: PositiveInt


class Guard(_Strict):
    """A behaviour of the base that was to be kept; its teacher is the base."""

    behavior: str
    prompts_sha256: str
    n_prompts: PositiveInt


class Moment(_Strict):
    """The objective at one step: recovery by behaviour, guards among them.

    ``fitted`` is over the prompts of that step, ``held_out`` over the prompts that were never
    fitted on, None where they were not looked at.
    """

    step: NonNegativeInt
    fitted: dict[str, float] | None
    held_out: dict[str, float] | None


class GatesManifest(_Strict):
    """The JSON under the metadata key."""

    format_version: Literal[1] = 1
    base: ModelId
    base_sha256: str
    experts: tuple[GatedExpert, ...]
    guards: tuple[Guard, ...]
    guard_weight: float
    architecture: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_groups: PositiveInt
    n_neurons: PositiveInt
    hidden_size: PositiveInt
    tensor_names: tuple[str, ...]
    upper: float
    start: str
    rate: float
    penalty: float
    prompts_a_step: PositiveInt
    best_step: NonNegativeInt
    history: tuple[Moment, ...]
    seed: int
    dtype: str
    #: arguments of `mergekit-wp` that made the file, see `scoring.command`
    command: tuple[str, ...] = ()
    created: str
    versions: dict[str, str]

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if not self.experts:
            raise ValueError("experts: none")
        if [moment.step for moment in self.history] != list(range(len(self.history))):
            raise ValueError("history: its steps do not count up from 0")
        if all(moment.step != self.best_step for moment in self.history):
            raise ValueError(f"history has no step {self.best_step}, whose gates these are")
        if len(set(self.tensor_names)) != len(self.tensor_names):
            raise ValueError("tensor_names holds a name twice")
        for name in self.tensor_names:
            layer = layout_of(name, self.dims).layer
            if layer is not None and layer >= self.n_layers:
                raise ValueError(f"tensor '{name}' lies in no layer of the model")
        return self

    @property
    def dims(self) -> Dims:
        """The dimensions that fix the components."""
        return Dims.named(
            self.architecture, self.n_layers, self.n_heads, self.n_kv_groups, self.n_neurons
        )

    @property
    def whole_tensors(self) -> tuple[str, ...]:
        """Tensors that are components by themselves."""
        return tuple(n for n in self.tensor_names if layout_of(n, self.dims).whole)

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of one expert's gates of one kind."""
        return {
            "head": (self.n_layers, self.n_heads),
            "kv_group": (self.n_layers, self.n_kv_groups),
            "neuron": (self.n_layers, self.n_neurons),
            "tensor": (len(self.whole_tensors),),
        }[kind]


@dataclass(frozen=True)
class GatesFile:
    """A checked gates file in memory."""

    manifest: GatesManifest
    tensors: dict[str, torch.Tensor]

    def gates(self, expert: int) -> dict[Kind, torch.Tensor]:
        """One expert's gates by kind."""
        return {kind: self.tensors[f"gate/{expert}/{kind}"] for kind in FINE_KINDS}

    def delta_norm(self, expert: int) -> dict[str, float]:
        """Frobenius norm of each tensor of one expert's task vector."""
        norms = self.tensors[f"delta_norm/{expert}"].tolist()
        return dict(zip(self.manifest.tensor_names, norms, strict=True))


def as_scores(file: GatesFile, expert: int) -> ScoreFile:
    """One expert's gates as a score file with ``path`` scores, whose merge is exactly the gates.

    A whole tensor has the mean gate of its components.
    """
    manifest, gates = file.manifest, file.gates(expert)
    of_tensor = {name: gates["tensor"][i] for i, name in enumerate(manifest.whole_tensors)}
    whole = []
    for name in manifest.tensor_names:
        layout = layout_of(name, manifest.dims)
        if not layout.whole:
            assert layout.layer is not None
            parts = [gates[kind][layout.layer] for kind in layout.kinds]
            of_tensor[name] = torch.cat(parts).mean()
        whole.append(of_tensor[name])
    own = manifest.experts[expert]
    reached = next(m for m in manifest.history if m.step == manifest.best_step)
    recovered = reached.held_out or reached.fitted or {}
    scores = ScoreFile(
        Manifest(
            base=manifest.base,
            expert=own.model,
            behavior=own.behavior,
            n_prompts=own.n_prompts,
            prompts_sha256=own.prompts_sha256,
            responses="expert",
            architecture=manifest.architecture,
            **manifest.dims.numbers,
            hidden_size=manifest.hidden_size,
            criteria=("kl",),
            estimands=("path",),
            kinds=FINE_KINDS,
            anchor=None,
            scale={},
            fidelity={
                f"path/kl/{kind}": Fidelity(method="fitted", steps=manifest.best_step)
                for kind in FINE_KINDS
            },
            noise_floor={},
            completeness={},
            tensor_names=manifest.tensor_names,
            company=tuple(
                CompanyMember(
                    reference=other.model.reference,
                    weights_sha256=other.weights_sha256,
                    behavior=other.behavior,
                    recovery=recovered.get(other.behavior, 0.0),
                )
                for other in manifest.experts
            ),
            dtype=manifest.dtype,
            seed=manifest.seed,
            created=manifest.created,
            versions=manifest.versions,
        ),
        {
            **{f"path/kl/{kind}": gates[kind] for kind in FINE_KINDS if kind != "tensor"},
            "path/kl/tensor": torch.stack(whole),
            "delta_norm": file.tensors[f"delta_norm/{expert}"],
        },
    )
    check_scores(scores)
    return scores


def _expected_shapes(manifest: GatesManifest) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for e in range(len(manifest.experts)):
        expected |= {f"gate/{e}/{kind}": manifest.shape(kind) for kind in FINE_KINDS}
        expected[f"delta_norm/{e}"] = (len(manifest.tensor_names),)
    return expected


def check(file: GatesFile) -> None:
    """Refuse tensors that do not fit the manifest.

    Raises:
        UserError: a missing, extra or misshapen tensor, another dtype, a NaN, or a gate out of
            bounds.
    """
    container.check(file.tensors, _expected_shapes(file.manifest))
    _check_bounds(file)


def _check_bounds(file: GatesFile) -> None:
    upper = file.manifest.upper
    for key, tensor in file.tensors.items():
        if (tensor < 0).any():
            raise UserError(f"tensor '{key}' holds a negative number")
        if key.startswith("gate/") and (tensor > upper * (1 + 1e-6)).any():
            raise UserError(f"tensor '{key}' holds a gate above {upper}")


def read(path: str | os.PathLike[str]) -> GatesFile:
    """Read and check a gates file.

    Raises:
        UserError: missing, unreadable, no gates file, of another version, or inconsistent; the
            message names the file.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"gates file {path} not found; make one with "
            "'mergekit-wp fit RECIPE --prompts EXPERT=FILE.jsonl --out gates.safetensors'"
        )
    try:
        with container.opened(path) as handle:
            manifest = _parse_manifest((handle.metadata() or {}).get(GATES_KEY))
            tensors = container.load(handle, _expected_shapes(manifest))
        file = GatesFile(manifest, tensors)
        _check_bounds(file)
    except UserError as error:
        raise UserError(f"gates file {path}: {error}") from error
    return file


def _parse_manifest(text: str | None) -> GatesManifest:
    if text is None:
        raise UserError(f"not a gates file: no '{GATES_KEY}' in its metadata")
    try:
        return GatesManifest.model_validate(parse_json(text))
    except ValidationError as error:
        raise UserError(f"bad manifest: {complaint(error)}") from error
    except ValueError as error:
        raise UserError(f"its manifest is not JSON ({error})") from error


def is_gates_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file calls itself a gates file; not whether it is a sound one."""
    try:
        with container.opened(path) as handle:
            return GATES_KEY in (handle.metadata() or {})
    except UserError:
        return False


def write(file: GatesFile, path: Path) -> None:
    """Check a gates file and write it under its name only when complete."""
    check(file)
    container.write(file.tensors, {GATES_KEY: file.manifest.model_dump_json()}, path)
