"""How far rankings agree: between runs, behaviours and experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.files.fingerprint import NORM_TOLERANCE
from mergekit_wp.files.manifest import Agreement
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.model_names import place_of
from mergekit_wp.statistics import between_files


def stability(
    file: str | os.PathLike[str],
    others: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    *,
    seed: int = 0,
) -> list[Agreement]:
    """Compare a score file with others, and write what was found into its manifest.

    Args:
        file: the score file.
        others: of the same architecture; with none, nothing is written.
        seed: of the resampling.

    Returns:
        What `score` found between halves of the prompts, then each other file's.

    Raises:
        UserError: a file that cannot be read, is given twice, or has nothing to compare.
    """
    every = [others] if isinstance(others, str | os.PathLike) else others
    paths = [Path(place_of(other, "others")) for other in every]
    if len(set(paths)) < len(paths):
        raise UserError("a file is given twice")
    own = scorefile.read(place_of(file, "file"))
    found: list[Agreement] = [a for a in own.manifest.stability if a.against == "halves"]
    for path in paths:
        found += compared(own, scorefile.read(path), path, seed)
    if paths:
        manifest = own.manifest.model_copy(update={"stability": tuple(found)})
        scorefile.write(replace(own, manifest=manifest), file)
    return found


def compared(own: ScoreFile, other: ScoreFile, path: Path, seed: int) -> list[Agreement]:
    """Agreement of all scores that both files have.

    Raises:
        UserError: the very same scores, another architecture, or no scores in common; names the
            file.
    """
    ours, theirs = own.manifest, other.manifest
    if own.digest() == other.digest():
        raise UserError(f"score file {path} holds the very same scores")
    if ours.dims != theirs.dims or ours.tensor_names != theirs.tensor_names:
        raise UserError(
            f"score file {path} is of another architecture: {theirs.architecture} with "
            f"{theirs.n_layers} layers, not {ours.architecture} with {ours.n_layers}"
        )
    keys = [key for key in ours.score_keys() if key in theirs.score_keys()]
    if not keys:
        raise UserError(
            f"score file {path} has none of the same scores: it has "
            f"{', '.join(theirs.score_keys())}"
        )
    against: Literal["run", "behavior", "expert"] = "expert"
    if _alike(own, other):
        against = "run" if ours.behavior == theirs.behavior else "behavior"
    found = []
    for key in keys:
        estimand, criterion, kind = key.split("/")
        one, two = (f.tensors[key].numpy().astype(np.float64) for f in (own, other))
        likeness = between_files(one, two, seed)
        if likeness is not None:
            found.append(
                Agreement(
                    against=against,
                    name=f"{theirs.behavior}, {theirs.expert.reference}",
                    estimand=estimand,  # type: ignore[arg-type]
                    criterion=criterion,
                    kind=kind,  # type: ignore[arg-type]
                    **vars(likeness),
                )
            )
    return found


def _alike(own: ScoreFile, other: ScoreFile) -> bool:
    """Whether two files are of the same expert: every tensor of the task vector has one norm."""
    theirs = other.delta_norm
    return all(
        abs(norm - theirs[name]) <= NORM_TOLERANCE * norm for name, norm in own.delta_norm.items()
    )
