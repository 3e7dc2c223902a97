"""``mergekit-wp merge``: a recipe in, a checkpoint out, or one line that says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import transformers
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_wp import preflight
from mergekit_wp import recipe as recipes
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.devices import check_device
from mergekit_wp.errors import UserError

# weight files of an earlier merge into the same folder, which a loader might take for the new ones
_WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")


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
    the Hugging Face Hub. OUT appears only when the merge is complete.

    \b
    merge_method: weight_patching
    base_model: path-or-hub-id
    models:
      - model: expert-inst
        parameters: {scores: scores/inst.safetensors, weight: 1.0}
      - model: expert-math
        parameters: {scores: scores/math.safetensors, weight: 1.0}
    parameters: {fusion: share, power: 0.5, lambda: 1.0}
    dtype: bfloat16
    """
    transformers.logging.set_verbosity_error()  # mergekit's own use of deprecated names
    ensure_registered()
    merge_options.apply_global_options()
    if merge_options.device:
        check_device(merge_options.device)
    target = Path(os.path.abspath(out))
    checked = recipes.read(recipe)
    _check_target(target, checked)
    preflight.check(checked, merge_options)
    with _staged(target) as folder:
        run_merge(checked.config, str(folder), options=merge_options, config_source=checked.source)
    click.echo(f"merged model written to {out}")


def _check_target(target: Path, checked: recipes.Recipe) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder for the merged model")
    for model in checked.config.referenced_models():
        source = model.model.path
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise UserError(f"{target} is an input of the merge; give another folder")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target with the same last name, moved there on success.

    Whatever ends the merge, nothing half-written remains.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    try:
        staged = hidden / target.name
        yield staged
        _move(staged, target)
        missing = []
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in missing:
            folder.rmdir()


def _move(staged: Path, target: Path) -> None:
    """Move a finished merge to its place; other files already there stay."""
    if not target.exists():
        staged.rename(target)
        return
    written = {path.name for path in staged.iterdir()}
    for path in list(target.iterdir()):
        if _WEIGHTS.match(path.name) and path.name not in written:
            path.unlink()
    for path in staged.iterdir():
        os.replace(path, target / path.name)
