"""A merge, from recipe to checkpoint."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_wp.errors import UserError, option
from mergekit_wp.files import scorefile
from mergekit_wp.files.atomic import (
    disk_trouble,
    refuse_existing,
    refuse_unwritable,
    staged_folder,
)
from mergekit_wp.merging import preflight
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.interface import difference_note
from mergekit_wp.merging.open_models import forget_adapters, place_for_adapters, with_snapshots
from mergekit_wp.merging.parameters import SPEC
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.placement import check_device


@dataclass(frozen=True)
class MergeOpened:
    """A merge that can begin.

    Attributes:
        stored: bytes of the weights of each model that is read.
        parts: numbers of every tensor that is written.
        width: bytes of one of them there.
        file: one of the files that are read.
    """

    stored: tuple[int, ...]
    parts: tuple[int, ...]
    width: int
    file: Path

    def check(self) -> None:
        """Nothing is left to refuse."""


#: writes what belongs beside the weights, given the folder, the recipe and mergekit's plan of it
Completion: TypeAlias = Callable[[Path, recipes.Recipe, Sequence[ExecuteMergeMethodTask]], None]


def merge(
    recipe: recipes.RecipeLike,
    out: str | os.PathLike[str],
    options: MergeOptions,
    complete: Completion,
    note: Callable[[str], None],
    *,
    overwrite: bool = False,
    plan: Callable[[MergeOpened], None] = lambda _: None,
) -> None:
    """Merge into a folder, which appears only when it is complete.

    mergekit knows our method once `autoload.ensure_registered` was called.

    Args:
        recipe: of any method of mergekit.
        out: the folder.
        options: mergekit's.
        complete: writes the model card, unless the options want none.
        note: told where the merge is not asked as an expert is.
        overwrite: replace a model, or files of it, that are there already.
        plan: told what will be read and written, once all is checked.

    Raises:
        UserError: any mistake in the recipe, its score files and its models that shows before
            merging; a device that cannot be used; a folder that is a file or an input.
        DiskError: the disk is full.
    """
    target = Path(os.path.abspath(out))
    checked = _checked(recipe, target, options, overwrite)
    models = checked.config.referenced_models()
    with (
        staged_folder(target, overwrite=overwrite) as folder,
        place_for_adapters(models, options, folder.with_name("adapters")) as options,
        _nothing_missing(),
    ):
        tasks = preflight.check(checked, options)
        if options.copy_tokenizer and (line := difference_note(checked.config, options)):
            note(line)
        plan(_opened(checked, tasks))
        # the card is written here: mergekit's asks the network about folders with one slash
        bare = options.model_copy(update={"write_model_card": False})
        config = with_snapshots(checked.config, bare)
        run_merge(config, str(folder), options=bare, config_source=checked.source)
        if options.write_model_card:
            complete(folder, checked, tasks)


def look(
    recipe: recipes.RecipeLike,
    out: str | os.PathLike[str],
    options: MergeOptions,
    *,
    overwrite: bool = False,
) -> MergeOpened:
    """What `merge` would read and write, after the same checks; nothing is written or merged.

    Of an expert with an adapter, no tensors are compared with its score file: mergekit would have
    to merge it first.

    Raises:
        UserError: see `merge`; or the folder cannot be written to.
    """
    target = Path(os.path.abspath(out))
    checked = _checked(recipe, target, options, overwrite)
    refuse_unwritable(target, target)
    try:
        return _opened(checked, preflight.check(checked, options, only_to_plan=True))
    finally:
        forget_adapters(checked)


def _checked(
    recipe: recipes.RecipeLike, target: Path, options: MergeOptions, overwrite: bool
) -> recipes.Recipe:
    """The recipe, if it can be merged here, and into the target."""
    options.apply_global_options()
    if options.device:
        check_device(options.device)
    if options.multi_gpu and not torch.accelerator.is_available():
        raise UserError(f"{option('multi_gpu')} needs a GPU, and there is none here; leave it out")
    checked = recipes.read(recipe)
    check_target(target, (model.model.path for model in checked.config.referenced_models()))
    check_free(target, options, overwrite)
    return checked


def _opened(recipe: recipes.Recipe, tasks: Sequence[ExecuteMergeMethodTask]) -> MergeOpened:
    models = recipe.config.referenced_models()
    shapes = preflight.shapes_of(recipe.config.base_model or models[0])
    dtype = recipe.config.out_dtype or recipe.config.dtype
    stored = tuple(preflight.stored_bytes(model) for model in models)
    parts = tuple(math.prod(shapes.get(task.output_weight.name, ())) for task in tasks)
    width = dtype_from_name(dtype).itemsize if dtype else max(1, stored[0] // max(1, sum(parts)))
    index = LoaderCache().get(models[0]).index
    file = Path(index.base_path, index.shards[0].filename)
    return MergeOpened(stored, parts, width, file)


def recipe_of(
    files: Sequence[str | os.PathLike[str]], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe that merges the experts of score files into the base of the first, by their scores.

    Args:
        files: one an expert, here or ``hf://...``; of experts fitted together all of them.
        settings: of the recipe they were made from, see `interface.SETTINGS`.

    Raises:
        UserError: no file, or one that cannot be read.
    """
    if not files:
        raise UserError("a merge by scores needs a score file for every expert; give some")
    named = [os.fspath(file) for file in files]
    manifests = [scorefile.read(local_path(name)).manifest for name in named]
    together = {} if manifests[0].company is None else {"parameters": {"fusion": "path"}}
    return {
        "merge_method": SPEC.name,
        "base_model": manifests[0].base.reference,
        "models": [
            {"model": manifest.expert.reference, "parameters": {"scores": name}}
            for name, manifest in zip(named, manifests, strict=True)
        ],
        **together,
        "dtype": manifests[0].base.weights_dtype,
        **(settings or {}),
    }


def check_target(target: Path, sources: Iterable[str]) -> None:
    """Refuse to write a model over a file, or over one of the models that are read.

    Raises:
        UserError: says which.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder for the model")
    for source in sources:
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise UserError(f"{target} is an input of the merge; give another folder")


def check_free(target: Path, options: MergeOptions, overwrite: bool) -> None:
    """Refuse a folder with a model, or with files that every merge writes.

    Args:
        target: the folder.
        options: mergekit's.
        overwrite: whether they may be replaced.

    Raises:
        UserError: they may not; names the first.
    """
    names = ["config.json"]
    names += ["README.md", "mergekit_config.yml"] if options.write_model_card else []
    names += ["tokenizer.json", "tokenizer_config.json"] if options.copy_tokenizer else []
    refuse_existing(target, overwrite, names)


@contextmanager
def _nothing_missing() -> Iterator[None]:
    """Mergekit logs a tokenizer that it could not copy and goes on; a full disk must end the run.

    Raises:
        Exception: what mergekit logged.
    """
    found: list[BaseException] = []

    def passes(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or disk_trouble(error) is None:
            return True
        found.append(error)
        return False

    logger = logging.getLogger("mergekit.merge")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
    if found:
        raise found[0]
