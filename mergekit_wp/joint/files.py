"""What scoring or fitting experts together writes: a score file for each, and a recipe for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.manifest import CompanyMember, Fidelity, Manifest
from mergekit_wp.files.scorefile import ScoreFile, write
from mergekit_wp.joint.members import Member
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.assemble import common_fields
from mergekit_wp.terms import Estimand, Kind

#: scores of one expert: by kind, in the shapes of a score file
Scores = Mapping[Kind, torch.Tensor]


def recipe_beside(folder: Path, read: Path) -> Path:
    """Where the recipe that merges by the files in a folder goes.

    Args:
        folder: of the score files.
        read: the recipe that names the experts.

    Raises:
        UserError: it would replace the recipe that is read.
    """
    path = folder / "recipe.yml"
    if path.resolve() == read.resolve():
        raise UserError(
            f"{option('out', folder)}: the recipe that merges by the new scores is written to "
            f"{path}, where the recipe is that is read; give another folder"
        )
    return path


def write_company(
    recipe: Path,
    members: Sequence[Member],
    references: Sequence[References],
    scores: Sequence[Mapping[Estimand, Scores]],
    recoveries: Sequence[float],
    fidelity: Fidelity,
    **said: Any,
) -> list[Path]:
    """Write one score file for every expert, and the recipe that merges by them.

    Args:
        recipe: where the recipe goes.
        members: the experts.
        references: base and expert on each one's prompts.
        scores: of each expert, by estimand; all by ``kl``.
        recoveries: how far each behaviour has come back at these scores.
        fidelity: how they were computed, all alike.
        said: what else every manifest says.

    Returns:
        The files in the order of the experts, then the recipe.

    Raises:
        UserError: one cannot be written.
    """
    company = tuple(
        CompanyMember(
            reference=m.pair.expert.name,
            weights_sha256=m.weights_sha256,
            behavior=str(m.request.behavior),
            recovery=recovery,
        )
        for m, recovery in zip(members, recoveries, strict=True)
    )
    for member, reference, own in zip(members, references, scores, strict=True):
        tensors = {
            f"{estimand}/kl/{kind}": by_kind[kind].float()
            for estimand, by_kind in own.items()
            for kind in member.request.kinds
        }
        norms = list(member.pair.delta_norm.values())
        manifest = Manifest(
            **common_fields(member.request, member.pair, member.prompts, reference),
            criteria=("kl",),
            estimands=tuple(own),
            anchor=None,
            fidelity=dict.fromkeys(tensors, fidelity),
            noise_floor={},
            company=company,
            **said,
        )
        tensors["delta_norm"] = torch.tensor(norms, dtype=torch.float32)
        write(ScoreFile(manifest, tensors), member.request.out)
    _write_recipe(recipe, members)
    return [*(member.request.out for member in members), recipe]


def _write_recipe(path: Path, members: Sequence[Member]) -> None:
    recipe: Mapping[str, Any] = {
        "merge_method": "weight_patching",
        "base_model": members[0].request.base,
        "models": [
            {"model": m.request.expert, "parameters": {"scores": str(m.request.out)}}
            for m in members
        ],
        "parameters": {"fusion": "path"},
        "dtype": members[0].pair.base.weights_dtype,
    }
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False))
