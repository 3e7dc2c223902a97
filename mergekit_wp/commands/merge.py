"""``mergekit-wp merge``: a recipe in, a checkpoint out, or one line that says what is wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
import transformers
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.card.write import write_card
from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import disk_trouble, staged_folder
from mergekit_wp.merging import preflight
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.models.placement import check_device


@click.command("merge", cls=PrettyPrintHelp, short_help="Merge experts as a recipe says.")
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@add_merge_options  # type: ignore[untyped-decorator]
def merge(merge_options: MergeOptions, recipe: str, out: str) -> None:
    """Merge the models of RECIPE into the folder OUT.

    RECIPE is a mergekit recipe; every merge method and every option of `mergekit-yaml` works.
    For `merge_method: weight_patching` the recipe, its score files and a few tensors of every
    expert are checked before anything is merged. A relative `scores` path is looked up in the
    recipe's folder first, then in the current one; `hf://owner/repo[@revision]/FILE` is a file on
    the Hugging Face Hub. OUT appears only when the merge is complete, with a model card for the
    Hub, the recipe and its score files; `mergekit-wp card` adds evaluation results to it.

    \b
    merge_method: weight_patching
    base_model: owner/base
    models:
      - model: owner/inst
        parameters: {scores: scores/inst.safetensors, weight: 1.0}
      - model: owner/math
        parameters: {scores: scores/math.safetensors, weight: 1.0}
    parameters: {fusion: share, power: 0.5, lambda: 1.0}
    dtype: bfloat16
    """
    transformers.logging.set_verbosity_error()  # mergekit's own use of deprecated names
    ensure_registered()
    merge_options.apply_global_options()
    if merge_options.device:
        check_device(merge_options.device)
    if merge_options.multi_gpu and not _has_accelerator():
        raise UserError("--multi-gpu needs a GPU, and there is none here; leave it out")
    target = Path(os.path.abspath(out))
    checked = recipes.read(recipe)
    _check_target(target, checked)
    tasks = preflight.check(checked, merge_options)
    # the card is written here: mergekit's asks the network about folders with one slash
    bare = merge_options.model_copy(update={"write_model_card": False})
    with staged_folder(target) as folder, _nothing_missing():
        run_merge(checked.config, str(folder), options=bare, config_source=checked.source)
        if merge_options.write_model_card:
            write_card(folder, checked, tasks)
    click.echo(f"merged model written to {out}")


def _has_accelerator() -> bool:
    """What mergekit's multi-GPU executor takes for granted."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    return torch.cuda.is_available()  # torch before 2.6


def _check_target(target: Path, checked: recipes.Recipe) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder for the merged model")
    for model in checked.config.referenced_models():
        source = model.model.path
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise UserError(f"{target} is an input of the merge; give another folder")


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
