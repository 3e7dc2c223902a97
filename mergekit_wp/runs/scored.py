"""Score files that a run goes by: the checkpoints they were made from, and what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.fingerprint import NORM_TOLERANCE
from mergekit_wp.files.manifest import ModelId
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.pair import Pair
from mergekit_wp.terms import CriterionName, Estimand


def scored_model(model: ModelId) -> str:
    """The checkpoint a score file was made from, at its commit where it is on the Hub."""
    pinned = "@" in model.reference.rpartition("+")[2] or model.revision is None
    return model.reference if pinned else f"{model.reference}@{model.revision}"


def check_scores(
    file: ScoreFile, path: Path, estimands: Sequence[Estimand], criterion: CriterionName
) -> None:
    """Refuse a score file that lacks scores.

    Raises:
        UserError: names them and says which it has.
    """
    manifest = file.manifest
    have = [f"{e}/{c}" for e in manifest.estimands for c in manifest.criteria]
    for estimand in estimands:
        if f"{estimand}/{criterion}" not in have:
            raise UserError(
                f"score file {path} has no '{estimand}/{criterion}' scores; it has "
                f"{', '.join(have)}; `score` with {option('estimand', ','.join(estimands))} "
                f"{option('criterion', criterion)} makes them"
            )


def check_pair(file: ScoreFile, pair: Pair, path: Path) -> None:
    """Refuse checkpoints a score file was not made from.

    Raises:
        UserError: names the first tensor whose task vector has another norm.
    """
    way_out = f"give the right ones as {option('base')} and {option('expert')}"
    check_norms(file.delta_norm, pair, f"score file {path}", way_out)


def check_norms(scored: Mapping[str, float], pair: Pair, source: str, way_out: str) -> None:
    """Refuse checkpoints whose task vector is not the one a file was made for.

    Args:
        scored: the file's norm of each tensor of the task vector.
        pair: the checkpoints.
        source: what the error calls the file.
        way_out: what to do about it.

    Raises:
        UserError: names the first tensor whose task vector has another norm.
    """
    if list(scored) != list(pair.delta_norm):
        raise UserError(f"{source} is of another architecture than {pair.expert.name}")
    for name, norm in pair.delta_norm.items():
        if abs(norm - scored[name]) > NORM_TOLERANCE * scored[name]:
            raise UserError(
                f"tensor {name}: {pair.expert.name} differs from {pair.base.name} by {norm:.6g}, "
                f"but {source} was made for {scored[name]:.6g}: these are other models; {way_out}"
            )
