"""What a fit writes: a score file for each expert, and a recipe that merges by them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.atomic import refuse_existing, written_whole
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.files.manifest import CompanyMember, Fidelity, Manifest
from mergekit_wp.files.scorefile import ScoreFile, read, write
from mergekit_wp.joint.members import Member, named_experts
from mergekit_wp.joint.request import FitRequest, NamedExperts
from mergekit_wp.merging.interface import settings_of
from mergekit_wp.merging.merge import recipe_of
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.model_names import absolute
from mergekit_wp.runs.journal import unfinished
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.score import common_fields
from mergekit_wp.terms import Kind

#: name of the recipe that merges by the files, beside them
RECIPE = "recipe.yml"
#: scores of one expert: by kind, in the shapes of a score file
ScoresByKind = Mapping[Kind, torch.Tensor]


def score_path(folder: Path, name: str) -> Path:
    """Where the score file of an expert goes."""
    return folder / f"{name}.safetensors"


def check_folder(request: FitRequest) -> None:
    """Refuse a folder where what is written would replace another recipe, or score files.

    Args:
        request: says where the score files go, and which recipe names the experts.

    Raises:
        UserError: names the folder or the file; or the recipe names no experts.
    """
    folder, named = request.out, request.recipe
    if folder is None:
        return
    path = folder / RECIPE
    if not isinstance(named, NamedExperts) and path.resolve() == named.resolve():
        raise UserError(
            f"{option('out', folder)}: the recipe that merges by the new scores is written to "
            f"{path}, where the recipe is that is read; give another folder"
        )
    base, experts, _ = named_experts(request)
    for source in (base, *experts.values()):
        if folder.exists() and os.path.exists(source) and folder.samefile(source):
            raise UserError(f"{option('out', folder)} is an input of the fit; give another folder")
    refuse_existing(path, request.overwrite)
    begun = unfinished(folder / "fit")
    for file in (score_path(folder, name) for name in experts):
        # a fit that was killed at its end has written some
        if not (begun and file.exists() and read(file).manifest.fit is not None):
            refuse_existing(file, request.overwrite)


def company_files(
    members: Sequence[Member],
    references: Sequence[References],
    scores: Sequence[ScoresByKind],
    recoveries: Sequence[float],
    finer: Sequence[torch.Tensor] | None,
    fit: Fit,
    **said: Any,
) -> dict[str, ScoreFile]:
    """One score file for every expert, by its name.

    Args:
        members: the experts.
        references: base and expert on each one's prompts.
        scores: ``path`` of each expert, by ``kl``.
        recoveries: how far each behaviour has come back at these scores.
        finer: of each expert the fitted gates, where these are finer than components.
        fit: how they were fitted.
        said: what else every manifest says.
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
    found = {}
    for e, (member, reference, own) in enumerate(zip(members, references, scores, strict=True)):
        tensors = {f"path/kl/{kind}": own[kind].float() for kind in member.request.kinds}
        fidelities = dict.fromkeys(tensors, Fidelity(method="fitted", steps=fit.best_step))
        norms = list(member.pair.delta_norm.values())
        if finer is not None:
            tensors[f"path/kl/{fit.granularity}"] = finer[e].float()
            said["tensor_shapes"] = tuple(member.pair.partition.shapes.values())
        manifest = Manifest(
            **common_fields(member.request, member.run, reference),
            criteria=("kl",),
            estimands=("path",),
            anchor=None,
            fidelity=fidelities,
            noise_floor={},
            completeness={},
            company=company,
            fit=fit,
            **said,
        )
        tensors["delta_norm"] = torch.tensor(norms, dtype=torch.float32)
        found[member.name] = ScoreFile(manifest, tensors)
    return found


def kept_settings(recipe: Path | NamedExperts) -> dict[str, Any]:
    """What a recipe made from another says as that does: tokenizer, chat template, dtypes."""
    return {} if isinstance(recipe, NamedExperts) else settings_of(Experts.read(recipe).config)


def write_company(
    folder: Path | None, files: Mapping[str, ScoreFile], settings: Mapping[str, Any]
) -> None:
    """Write the score files of all experts, and the recipe that merges by them.

    Args:
        folder: where the recipe goes; None writes nothing.
        files: by the experts' names.
        settings: of the recipe, see `kept_settings`.

    Raises:
        UserError: one cannot be written.
    """
    if folder is None:
        return
    for name, file in files.items():
        write(file, score_path(folder, name))
    recipe = company_recipe(folder, list(files), settings)
    with written_whole(folder / RECIPE) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False))


def company_recipe(
    folder: Path, names: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe that merges by the score files of all experts, for their folder.

    Args:
        folder: of the files.
        names: of the experts.
        settings: of the recipe, see `kept_settings`.

    Raises:
        UserError: a file cannot be read.
    """
    recipe = recipe_of([str(score_path(folder, name)) for name in names], settings)
    # mergekit looks for models from wherever it runs; score files move with their recipe
    recipe["base_model"] = absolute(recipe["base_model"])
    for name, model in zip(names, recipe["models"], strict=True):
        model["model"] = absolute(model["model"])
        model["parameters"]["scores"] = score_path(folder, name).name
    return recipe
