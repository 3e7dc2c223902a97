"""The fit that an earlier run finished, where the merge that was to follow did not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile, read
from mergekit_wp.joint.files import RECIPE, company_recipe, kept_settings, score_path
from mergekit_wp.joint.fit import guard_prompts, warnings
from mergekit_wp.joint.members import requests_of
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.options import declared
from mergekit_wp.prompts import read_prompts
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.progress import Progress
from mergekit_wp.scoring.request import ScoreRequest

#: options whose content is compared, and what a result does not depend on
_APART = ("prompts", "guards", "device")


def finished(request: FitRequest, target: Path, progress: Progress) -> dict[str, ScoreFile] | None:
    """The score files of a fit that is there already, by the experts' names.

    Args:
        request: the fit that is asked for.
        target: where its merge goes.
        progress: told that it is there.

    Returns:
        None where there is none, or another one is to be made in its place.

    Raises:
        UserError: it is a fit of something else (says what differs), or a file of it is damaged.
    """
    folder = request.out
    if folder is None or request.overwrite or request.restart or not (folder / RECIPE).exists():
        return None
    files, changed = compared(request, folder, progress)
    if changed:
        command = shlex.join(["mergekit-wp", "merge", str(folder / RECIPE), str(target)])
        raise UserError(
            f"{folder} holds a finished fit of something else; changed: {', '.join(changed)}; "
            f"merge by it with `{command}`, add {option('overwrite', True)} to fit anew, or choose "
            f"another {option('out')}"
        )
    progress.note(f"{folder} holds this fit, and it is finished: going on with the merge")
    for line in warnings(_fit_of(next(iter(files.values())).manifest)):
        progress.note(line)
    return files


def compared(
    request: FitRequest, folder: Path, progress: Progress
) -> tuple[dict[str, ScoreFile], list[str]]:
    """The score files of a finished fit, and what it was made of that `request` is not.

    Args:
        request: the fit that is asked for.
        folder: of the finished one.
        progress: told how far the comparison is.

    Raises:
        UserError: a file of it is damaged, or any mistake in the inputs.
    """
    experts = requests_of(request, folder)
    paths = {name: score_path(folder, name) for name in experts}
    files = {name: read(path) for name, path in paths.items() if path.exists()}
    return files, list(_changed(request, folder, experts, files, progress))


def _changed(
    request: FitRequest,
    folder: Path,
    experts: Mapping[str, ScoreRequest],
    files: Mapping[str, ScoreFile],
    progress: Progress,
) -> Iterator[str]:
    """What a fit that is there was made of and this one is not: paths may differ, contents not."""
    manifests = [file.manifest for file in files.values()]
    if len(files) < len(experts) or any(len(m.company or ()) != len(experts) for m in manifests):
        yield "the experts"
        return
    first = manifests[0]
    if Checkpoint(next(iter(experts.values())).base).config_hash != first.base.config_hash:
        yield "the base"
    progress.stage("comparing with the fit that is there", len(experts), "expert")
    for member, (name, own) in zip(first.company or (), experts.items(), strict=True):
        manifest, expert = files[name].manifest, Checkpoint(own.expert)
        found = (expert.config_hash, expert.weights_sha256())
        if found != (manifest.expert.config_hash, member.weights_sha256):
            yield f"expert {name}"
        prompts = read_prompts(own.prompts, own.max_prompts, name)
        if prompts.sha256 != manifest.prompts_sha256:
            yield f"prompts of {name}"
        progress.advance(1)
    asked = [guard.sha256 for guard in guard_prompts(request)]
    if asked != [guard.prompts_sha256 for guard in _fit_of(first).guards]:
        yield option("guards")
    yield from _changed_options(request, first.command)
    if _said(_written(folder / RECIPE)) != _said(
        company_recipe(folder, list(files), kept_settings(request.recipe))
    ):
        yield RECIPE


def _changed_options(request: FitRequest, command: Sequence[str]) -> Iterator[str]:
    now = command_of(request)
    if not now or not command:
        yield "nobody knows what, for its prompts are in no file"
        return
    before, after = map(_values, (command, now))
    for name, field in declared(FitRequest).items():
        old, new = before.get(field.flag), after.get(field.flag)
        if name == "steps":  # a fit that was stopped is asked for fewer, to end with what it has
            differs = request.steps > int(old if old and old.isdigit() else 0)
        elif name == "start":  # of scores nobody knows any more what they were
            differs = old != new or new == "scores"
        else:
            differs = old != new and not field.positional and name not in _APART
        if differs:
            switch = isinstance(getattr(request, name), bool)
            yield option(name) + ("" if switch else f" ({old or 'none'} -> {new or 'none'})")


def _values(command: Sequence[str]) -> dict[str, str]:
    """What stands behind each option; with commas where it stands there several times."""
    found: dict[str, str] = {}
    for flag, value in pairwise((*command, "")):
        found[flag] = f"{found[flag]}, {value}" if flag in found else value
    return found


def _fit_of(manifest: Manifest) -> Fit:
    assert manifest.fit is not None  # a manifest that names its company has a fit
    return manifest.fit


def _written(recipe: Path) -> Any:
    try:
        return yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _said(recipe: Any) -> Any:
    """What a recipe says beside the places of its models."""
    if isinstance(recipe, list):
        return [_said(part) for part in recipe]
    if isinstance(recipe, dict):
        return {k: _said(v) for k, v in recipe.items() if k not in ("base_model", "model")}
    return recipe
