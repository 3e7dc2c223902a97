"""Score files beside the merged weights: copied, hashed, and named so by the recipe."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_wp.files import scorefile
from mergekit_wp.files.atomic import refuse_link_out, written_whole
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.merging.recipe import Recipe, find_score_file, score_texts, with_scores

FOLDER = "scores"


@dataclass(frozen=True)
class ScoreCopy:
    """One score file of a merge: where its copy is, its sha256, and what it says of itself."""

    name: str
    sha256: str
    manifest: Manifest


def copy_scores(recipe: Recipe, folder: Path) -> tuple[list[ScoreCopy], str]:
    """Copy the recipe's score files, and point the recipe at the copies.

    Args:
        recipe: a weight_patching recipe.
        folder: of the merged model.

    Returns:
        The copies in the recipe's order, and the recipe's text with ``scores`` relative to the
        folder; comments stay. References to the Hub stay as they are.

    Raises:
        UserError: a file cannot be found, read or written.
    """
    refuse_link_out(folder / FOLDER, folder)
    beside = recipe.path.absolute().parent
    data = yaml.safe_load(recipe.source)
    names_of = {text: find_score_file(text, beside) for text in dict.fromkeys(score_texts(data))}
    names = _names(names_of)
    copies: dict[str, ScoreCopy] = {}
    for reference, name in names.items():
        found = Path(names_of[reference])
        target = folder / FOLDER / name
        if not (target.exists() and target.samefile(found)):
            with written_whole(target) as temporary:
                shutil.copyfile(found, temporary)
        content = hashlib.sha256(target.read_bytes()).hexdigest()
        copies.setdefault(
            name, ScoreCopy(f"{FOLDER}/{name}", content, scorefile.read(target).manifest)
        )
    moved = {
        reference: f"{FOLDER}/{name}"
        for reference, name in names.items()
        if not reference.startswith("hf://")
    }
    return list(copies.values()), _renamed(recipe.source, data, moved)


def _names(found: dict[str, str]) -> dict[str, str]:
    """A file name for every reference; the same for the same file, else distinct."""
    taken: dict[str, str] = {}
    names = {}
    for reference, path in found.items():
        stem, number = Path(path).stem, 1
        name = f"{stem}.safetensors"
        while taken.get(name, path) != path:
            number += 1
            name = f"{stem}-{number}.safetensors"
        taken[name] = path
        names[reference] = name
    return names


def _renamed(source: str, data: Any, moved: dict[str, str]) -> str:
    """The recipe's text with other paths: edited in place, written anew where that fails."""
    wanted = with_scores(data, lambda text: moved.get(text, text))
    if moved:
        longest = sorted(moved, key=len, reverse=True)
        pattern = "|".join(re.escape(reference) for reference in longest)
        edited = re.sub(rf"(?<![\w./-])({pattern})(?![\w/-])", lambda m: moved[m[1]], source)
        try:
            if yaml.safe_load(edited) == wanted:
                return edited
        except yaml.YAMLError:
            pass
    return source if wanted == data else yaml.safe_dump(wanted, sort_keys=False)
