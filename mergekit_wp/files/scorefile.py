"""The score file: one safetensors file with a JSON manifest (docs/file-format.md).

Reading refuses whatever does not fit: a score file nobody can misuse silently is the point.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError

from mergekit_wp.components import GateLayout, layout_of, positions
from mergekit_wp.errors import UserError
from mergekit_wp.files import container
from mergekit_wp.files.manifest import DRAWS, FORMAT_VERSION, Manifest
from mergekit_wp.files.untrusted import complaint, parse_json
from mergekit_wp.terms import SLICED_KINDS, Kind

METADATA_KEY = "mergekit_wp"


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

    @cached_property
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

    @cached_property
    def gate_layouts(self) -> dict[str, GateLayout]:
        """How gates finer than components lie in every tensor; empty where there are none."""
        return self.manifest.gate_layouts

    @cached_property
    def gate_places(self) -> dict[str, slice]:
        """Where every tensor's gates stand among `finer_gates`."""
        return positions(self.gate_layouts)

    def finer_gates(self, criterion: str) -> torch.Tensor:
        """Gates finer than components, ``[gates]``: of one tensor after the other.

        Raises:
            UserError: there are none.
        """
        return self.scores("path", criterion, self.manifest.granularity)

    def digest(self) -> str:
        """Hash of the scores alone, which later findings in the manifest do not change."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode() + self.tensors[key].numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def fine_tensor_names(self) -> tuple[str, ...]:
        """Tensors that are fine components by themselves (norms, embeddings, ...)."""
        dims = self.manifest.dims
        return tuple(n for n in self.manifest.tensor_names if layout_of(n, dims).whole)


def _expected_shapes(manifest: Manifest, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    shapes = {key: manifest.shape(key.split("/")[2]) for key in manifest.score_keys()}  # type: ignore[arg-type]
    shapes |= {
        f"{key}{end}": shape
        for key, shape in shapes.items()
        for end in (".se", container.COUNTS)
        if f"{key}{end}" in keys
    }
    shapes |= manifest.finer_shapes
    shapes["delta_norm"] = (len(manifest.tensor_names),)
    if manifest.anchor is not None:
        shapes["anchor/vector"] = (manifest.hidden_size,)
    return shapes


def check(score_file: ScoreFile) -> None:
    """Refuse tensors that do not fit the manifest.

    Raises:
        UserError: a missing, extra or misshapen tensor, another dtype, a NaN, a negative norm, or
            a ``path`` score out of bounds.
    """
    tensors = score_file.tensors
    container.check(tensors, _expected_shapes(score_file.manifest, tensors))
    _check_bounds(score_file)


def _check_bounds(score_file: ScoreFile) -> None:
    tensors, manifest = score_file.tensors, score_file.manifest
    if (tensors["delta_norm"] < 0).any():
        raise UserError("tensor 'delta_norm' holds a negative norm")
    for key, tensor in tensors.items():
        if key.endswith(container.COUNTS) and (tensor > DRAWS).any():
            raise UserError(f"tensor '{key}' counts more than {DRAWS} draws")
        if not key.startswith("path/") or key.endswith((".se", container.COUNTS)):
            continue
        upper = manifest.path_bound(key.split("/")[2])
        if (tensor < 0).any() or (tensor > upper * (1 + 1e-6)).any():
            raise UserError(f"tensor '{key}' holds a score that is not within 0 and {upper:g}")


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


def _listed(folder: str | os.PathLike[str]) -> str:
    """Files of a folder that may be score files, those of a merge before its weights."""
    found = [*Path(folder, "merge").glob("*.safetensors"), *Path(folder).glob("*.safetensors")]
    named = sorted(str(file) for file in found if not file.name.startswith("model"))
    return f": {', '.join(named[:3])}" if named else ""


def _unfinished(*outputs: Path) -> str:
    """What to say where a run that writes one of these is not finished; else nothing."""
    beside = (output.with_name(f"{output.name}.partial") for output in outputs)
    kept = next((folder for folder in beside if folder.is_dir()), None)
    if kept is None:
        return ""
    return f"{kept} holds an unfinished run; its command, given again, goes on with it"


def read(path: str | os.PathLike[str]) -> ScoreFile:
    """Read and check a score file.

    Raises:
        UserError: missing, unreadable, truncated, of another version, or inconsistent; the
            message names the file.
    """
    here = Path(path)
    if here.is_dir():
        listed = _listed(path)
        begun = "" if listed else _unfinished(here / "fit", here / "merge" / "fit")
        what = begun or f"give one of the score files in it{listed}"
        raise UserError(f"{path} is a folder; {what}")
    if not here.is_file():
        what = _unfinished(here, here.with_name("fit")) or (
            "make one with "
            "'mergekit-wp score BASE EXPERT --prompts FILE.jsonl --out FILE.safetensors', or with "
            "'mergekit-wp fit' for a recipe with 'fusion: path'"
        )
        raise UserError(f"score file {path} not found; {what}")
    try:
        with container.opened(path) as handle:
            manifest = parse_manifest((handle.metadata() or {}).get(METADATA_KEY))
            tensors = container.load(handle, _expected_shapes(manifest, set(handle.keys())))
        score_file = ScoreFile(manifest, tensors)
        _check_bounds(score_file)
    except UserError as error:
        raise UserError(f"score file {path}: {error}") from error
    return score_file


def write(score_file: ScoreFile, path: str | os.PathLike[str]) -> None:
    """Check a score file and write it under its name only when complete."""
    check(score_file)
    metadata = {METADATA_KEY: score_file.manifest.model_dump_json()}
    container.write(score_file.tensors, metadata, Path(path))
