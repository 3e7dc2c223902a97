"""`mergekit-wp aim`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from mergekit_wp.models.checkpoint import Checkpoint

_LEFT_OUT = ("mergekit_config.yml",)  # it describes another model than the one written here
_NOTE = """
## Activation-Informed Merging

Afterwards the weights of input channels that the base uses most were drawn back to the base by
[AIM](https://arxiv.org/abs/2502.02421) with omega {omega:g}, calibrated on {count} prompts
(`mergekit-wp aim`).
"""


@click.command(short_help="Apply Activation-Informed Merging to a merge.")
@click.argument("merged")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The merge's base: a folder or Hub id.")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompt file (JSONL with 'prompt', optional 'response') whose texts the base's "
    "activations are measured on.",
)
@click.option(
    "--omega",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="How much of the change stays in the base's most active channel; 1 changes nothing.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Texts per forward pass; halved when memory runs out.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
def aim(
    merged: str,
    out: Path,
    base: str,
    calibration: Path,
    omega: float,
    batch_size: int,
    device: str,
) -> None:
    """Apply Activation-Informed Merging (arXiv 2502.02421) to the checkpoint MERGED, into OUT.

    Whatever method made the merge: the weights of input channels that the base uses most on the
    calibration texts keep most of the base's values. Embeddings, norms and a tied output head stay
    as merged. OUT appears only when it is complete.

    \b
      mergekit-wp aim merged/ merged-aim/ --base BASE --calibration prompts.jsonl
    """
    import transformers
    from tqdm import tqdm

    from mergekit_wp.errors import UserError
    from mergekit_wp.files.atomic import staged_folder
    from mergekit_wp.merging.aim import activation_importance
    from mergekit_wp.models.backoff import fitting
    from mergekit_wp.models.checkpoint import Checkpoint
    from mergekit_wp.models.load import load_folder
    from mergekit_wp.models.placement import choose_device
    from mergekit_wp.prompts import read_prompts
    from mergekit_wp.runs.progress import BarProgress

    transformers.logging.set_verbosity_error()
    device = choose_device(device)
    prompts = read_prompts(calibration, None).prompts
    start, end = Checkpoint(base), Checkpoint(merged)
    for checkpoint in (start, end):
        checkpoint.require_whole("aim")
    target = out.absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file; give a folder for the model")
    for source in (start, end):
        if target.exists() and target.samefile(source.path):
            raise UserError(f"{out} is an input; give another folder")
    if start.architecture != end.architecture:
        raise UserError(
            f"'{merged}' is {end.architecture}, but its base '{base}' {start.architecture}"
        )
    tokenizer = start.tokenizer() or end.tokenizer()
    if tokenizer is None:
        raise UserError(f"neither '{base}' nor '{merged}' has a tokenizer")
    model = load_folder(start.path, "auto", device)
    _, importance = fitting(
        min(batch_size, max(1, len(prompts))),
        partial(activation_importance, model, tokenizer, prompts),
        BarProgress().note,
    )
    del model
    with staged_folder(target) as folder:
        files = tqdm(end.weight_files, unit="file", desc="AIM")
        _write(start, end, importance, omega, files, folder)
        readme = folder / "README.md"
        if readme.exists():
            note = _NOTE.format(omega=omega, count=len(prompts))
            readme.write_text(readme.read_text(encoding="utf-8").rstrip() + "\n" + note)
    click.echo(f"model written to {out}")


def _write(
    base: Checkpoint,
    merged: Checkpoint,
    importance: dict[str, torch.Tensor],
    omega: float,
    weight_files: Iterable[Path],
    folder: Path,
) -> None:
    """The merge's files with other weights: one weight file in memory at a time."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from mergekit_wp.errors import UserError
    from mergekit_wp.merging.aim import apply_aim

    stored = set(merged.headers)
    if missing := sorted(set(importance) - stored):
        raise UserError(f"'{merged.name}' has no tensor {missing[0]}; is '{base.name}' its base?")
    names = {path.name for path in merged.weight_files}
    folder.mkdir(parents=True)
    for path in Path(merged.path).iterdir():
        if path.is_file() and path.name not in (*names, *_LEFT_OUT):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "scores":
            shutil.copytree(path, folder / path.name)
    for file in weight_files:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        here = {name: importance[name] for name in tensors if name in importance}
        start = {name: base.tensor(name, torch.float32) for name in here}
        changed = apply_aim(start, tensors, here, omega)
        save_file(changed, folder / file.name, metadata=metadata or {"format": "pt"})
