"""The score file: one safetensors file with a JSON manifest (docs/file-format.md).

Reading refuses whatever does not fit: a score file nobody can misuse silently is the point.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mergekit_wp.architectures import Dims
from mergekit_wp.components import layout_of
from mergekit_wp.errors import UserError
from mergekit_wp.files import container
from mergekit_wp.files.untrusted import complaint, parse_json
from mergekit_wp.terms import (
    SLICED_KINDS,
    CriterionName,
    Direction,
    Estimand,
    Kind,
    ScoringMethod,
    SetName,
)

FORMAT_VERSION = 1
METADATA_KEY = "mergekit_wp"
#: criteria of one file; a manifest of strangers names what is made of them before it is read
MAX_CRITERIA = 64


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelId(_Strict):
    """Which checkpoint was scored."""

    reference: str
    revision: str | None
    config_hash: str
    #: dtype the weights are stored in; merges cast down from it are compared less strictly
    weights_dtype: str


class Anchor(_Strict):
    """The vector anchor: where it was taken and how well it separates.

    ``separation`` is the effect size on held-out prompts, None with too few prompts to hold out.
    """

    layer: int
    contrast: Literal["instruction", "checkpoint"]
    separation: float | None
    n_contrasts: int


class Fidelity(_Strict):
    """How the scores of one estimand/criterion/kind were computed, and how far to trust them.

    For first-order scores, ``verified_top`` leaders and ``verified_random`` uniformly drawn
    components were swapped exactly; the correlations are between the two, over all verified
    components and over the random ones alone, and ``largest_missed`` is the largest exact
    |score| among random components that are not leaders.
    """

    method: ScoringMethod
    steps: int | None = None
    verified_top: int = 0
    verified_random: int = 0
    pearson: float | None = None
    spearman: float | None = None
    pearson_random: float | None = None
    largest_missed: float | None = None


class Scale(_Strict):
    """Raw criterion value at the base and at the expert (means over prompts)."""

    base: float
    expert: float


class CompanyMember(_Strict):
    """One of the experts that were scored together.

    ``weights_sha256`` is over the content of its weight files; ``recovery`` is how far its
    behaviour had come back where the guided path ended (0 at the base, 1 at the expert).
    """

    reference: str
    weights_sha256: str
    behavior: str
    recovery: float


class SetPoint(_Strict):
    """One point of a verification: a set of components swapped together, with its 95% interval.

    ``direction``: base plus the set (restoration: how far it gets, 0 to 1), or expert minus the set
    (knockout: how much it loses). ``measure`` is a criterion or "behavior" (checked answers).
    """

    direction: Direction
    set: SetName
    size: PositiveInt
    measure: CriterionName
    value: float
    low: float
    high: float


class Verification(_Strict):
    """What the leading components do together, beside the last ones and random ones."""

    estimand: Estimand
    criterion: CriterionName
    prompts_sha256: str
    n_prompts: PositiveInt
    n_items: int
    draws: PositiveInt
    points: tuple[SetPoint, ...]
    seed: int
    #: arguments of `mergekit-wp` but for the file, and versions, see `scoring.command`
    command: tuple[str, ...]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _whole_curves(self) -> Self:
        sizes: dict[tuple[str, str, str], list[int]] = {}
        for point in self.points:
            sizes.setdefault((point.measure, point.direction, point.set), []).append(point.size)
        wanted = {
            (point.measure, direction, name)
            for point in self.points
            for direction in get_args(Direction)
            for name in get_args(SetName)
        }
        if set(sizes) != wanted:
            raise ValueError("points: a curve is missing")
        if any(
            sorted(of) != sorted(set(sizes[key[0], "restoration", "top"]))
            for key, of in sizes.items()
        ):
            raise ValueError("points: the curves have other sizes, or one twice")
        return self


class Agreement(_Strict):
    """How alike two rankings of the same components are.

    ``against``: "halves" are two random halves of the prompts (mean and 95% range over splits);
    "run" is another scoring of this expert on this behaviour, "behavior" this expert on another
    behaviour, "expert" another expert (of another training seed, say). There the interval is a
    bootstrap over layers. ``name`` says which other file it was, "" for halves.
    """

    against: Literal["halves", "run", "behavior", "expert"]
    name: str
    estimand: Estimand
    criterion: CriterionName
    kind: Kind
    spearman: float
    low: float
    high: float
    #: Jaccard overlap of the two top `top`
    jaccard: float
    top: PositiveInt


class Manifest(_Strict):
    """The JSON under the metadata key ``mergekit_wp``.

    ``responses`` says whose answers the prompts were continued with: the prompt file's, the
    expert's own, or some of each. ``company`` names the experts that were scored together, this
    one among them; None for an expert scored alone.
    """

    format_version: int = FORMAT_VERSION
    base: ModelId
    expert: ModelId
    behavior: str
    n_prompts: PositiveInt
    prompts_sha256: str
    responses: Literal["given", "expert", "mixed"]
    architecture: str
    n_layers: PositiveInt
    n_heads: NonNegativeInt
    n_kv_groups: NonNegativeInt
    n_neurons: NonNegativeInt
    hidden_size: PositiveInt
    criteria: Annotated[tuple[CriterionName, ...], Field(max_length=MAX_CRITERIA)]
    estimands: tuple[Estimand, ...]
    kinds: tuple[Kind, ...]
    anchor: Anchor | None
    scale: dict[CriterionName, Scale]
    fidelity: dict[str, Fidelity]
    noise_floor: dict[CriterionName, float]
    completeness: dict[str, float]
    tensor_names: tuple[str, ...]
    company: tuple[CompanyMember, ...] | None
    verification: Verification | None = None
    stability: tuple[Agreement, ...] = ()
    dtype: str
    seed: int
    #: arguments of `mergekit-wp` that made the file, see `scoring.command`
    command: tuple[str, ...] = ()
    created: str
    versions: dict[str, str]

    @model_validator(mode="after")
    def _tensors_fit(self) -> Self:
        if len(set(self.tensor_names)) != len(self.tensor_names):
            raise ValueError("tensor_names holds a name twice")
        for field in (self.estimands, self.criteria, self.kinds):
            if len(set(field)) != len(field):
                raise ValueError(f"{', '.join(field)}: a name stands twice")
        for kind in SLICED_KINDS:
            if kind in self.kinds and not self.dims.count(kind):
                raise ValueError(f"n_{kind}s is 0, but kinds has '{kind}'")
        if ("path" in self.estimands) != (self.company is not None):
            raise ValueError("'path' scores and a 'company' belong together")
        if self.anchor is not None and not 0 <= self.anchor.layer < self.n_layers:
            raise ValueError(f"the anchor lies in layer {self.anchor.layer} of {self.n_layers}")
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

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of a score tensor of one kind."""
        return {
            "layer": (self.n_layers,),
            "tensor": (len(self.tensor_names),),
            "head": (self.n_layers, self.n_heads),
            "kv_group": (self.n_layers, self.n_kv_groups),
            "neuron": (self.n_layers, self.n_neurons),
        }[kind]

    def score_keys(self) -> list[str]:
        """Names of all score tensors this manifest promises."""
        return [f"{e}/{c}/{k}" for e in self.estimands for c in self.criteria for k in self.kinds]


@dataclass(frozen=True)
class ScoreFile:
    """A checked score file in memory."""

    manifest: Manifest
    tensors: dict[str, torch.Tensor]

    def scores(self, estimand: str, criterion: str, kind: str) -> torch.Tensor:
        """One score tensor, float32, shaped as `Manifest.shape` says.

        Raises:
            UserError: the file has no such scores; says which it has.
        """
        key = f"{estimand}/{criterion}/{kind}"
        if key not in self.tensors:
            have = ", ".join(self.manifest.score_keys())
            raise UserError(f"no scores '{key}' in this score file; it has {have}")
        return self.tensors[key]

    @property
    def delta_norm(self) -> dict[str, float]:
        """Frobenius norm of each tensor of the task vector."""
        return dict(
            zip(self.manifest.tensor_names, self.tensors["delta_norm"].tolist(), strict=True)
        )

    def fine_scores(self, estimand: str, criterion: str) -> dict[Kind, torch.Tensor]:
        """Scores over the fine partition, as far as the file's kinds reach.

        Under ``tensor`` only the tensors that are components by themselves remain, in the order
        of `fine_tensor_names`.
        """
        fine: dict[Kind, torch.Tensor] = {}
        for kind in SLICED_KINDS:
            if kind in self.manifest.kinds:
                fine[kind] = self.scores(estimand, criterion, kind)
        if "tensor" in self.manifest.kinds:
            every = self.scores(estimand, criterion, "tensor")
            index = {name: i for i, name in enumerate(self.manifest.tensor_names)}
            fine["tensor"] = every[[index[name] for name in self.fine_tensor_names]]
        return fine

    def digest(self) -> str:
        """Hash of the scores alone, which later findings in the manifest do not change."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode() + self.tensors[key].numpy().tobytes())
        return digest.hexdigest()

    @property
    def fine_tensor_names(self) -> tuple[str, ...]:
        """Tensors that are fine components by themselves (norms, embeddings, ...)."""
        dims = self.manifest.dims
        return tuple(n for n in self.manifest.tensor_names if layout_of(n, dims).whole)


def _expected_shapes(manifest: Manifest, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    shapes = {key: manifest.shape(key.split("/")[2]) for key in manifest.score_keys()}  # type: ignore[arg-type]
    shapes |= {f"{key}.se": shape for key, shape in shapes.items() if f"{key}.se" in keys}
    shapes["delta_norm"] = (len(manifest.tensor_names),)
    if manifest.anchor is not None:
        shapes["anchor/vector"] = (manifest.hidden_size,)
    return shapes


def check(score_file: ScoreFile) -> None:
    """Refuse tensors that do not fit the manifest.

    Raises:
        UserError: a missing, extra or misshapen tensor, another dtype, a NaN, or a negative norm.
    """
    tensors = score_file.tensors
    container.check(tensors, _expected_shapes(score_file.manifest, tensors))
    _check_norms(tensors)


def _check_norms(tensors: Mapping[str, torch.Tensor]) -> None:
    if (tensors["delta_norm"] < 0).any():
        raise UserError("tensor 'delta_norm' holds a negative norm")


def parse_manifest(text: str | None) -> Manifest:
    """Parse and check the JSON manifest.

    Raises:
        UserError: not a manifest, or one of another format version.
    """
    if text is None:
        raise UserError(f"not a score file: no '{METADATA_KEY}' in its metadata")
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise UserError(f"its manifest is not JSON ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        shown = f"{version!r:.40}"
        raise UserError(f"format version {shown}; this mergekit-wp reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"bad manifest: {complaint(error)}") from error


def read(path: str | os.PathLike[str]) -> ScoreFile:
    """Read and check a score file.

    Raises:
        UserError: missing, unreadable, truncated, of another version, or inconsistent; the
            message names the file.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"score file {path} not found; make one with "
            "'mergekit-wp score BASE EXPERT --prompts FILE.jsonl --out FILE.safetensors'"
        )
    try:
        with container.opened(path) as handle:
            metadata = handle.metadata() or {}
            if f"{METADATA_KEY}_gates" in metadata:
                raise UserError("it is a gates file: name it as the recipe's 'gates'")
            manifest = parse_manifest(metadata.get(METADATA_KEY))
            tensors = container.load(handle, _expected_shapes(manifest, set(handle.keys())))
        _check_norms(tensors)
    except UserError as error:
        raise UserError(f"score file {path}: {error}") from error
    return ScoreFile(manifest, tensors)


def write(score_file: ScoreFile, path: str | os.PathLike[str]) -> None:
    """Check a score file and write it under its name only when complete."""
    check(score_file)
    metadata = {METADATA_KEY: score_file.manifest.model_dump_json()}
    container.write(score_file.tensors, metadata, Path(path))
