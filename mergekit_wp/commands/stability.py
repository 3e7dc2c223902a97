"""`mergekit-wp stability`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile

if TYPE_CHECKING:
    from mergekit_wp.files.manifest import Agreement
    from mergekit_wp.files.scorefile import ScoreFile


@click.command(short_help="Compare the rankings of score files.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("others", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seed", type=int, default=0, show_default=True, help="Of the resampling.")
def stability(file: Path, others: tuple[Path, ...], seed: int) -> None:
    """Compare score FILE with OTHERS of the same architecture, component by component.

    An other file may be the same expert on another behaviour, another run of it, or another
    expert, such as one of another training seed. For each kind: the rank correlation with its 95%
    interval (layers resampled), and the Jaccard overlap of the leading 1%. Beside them stand the
    halves of the prompts, which `score` has measured: no ranking agrees with another one better
    than with itself. The result is printed and written into FILE's manifest, for `inspect` and
    `plot`.

    \b
      mergekit-wp stability caps.safetensors title.safetensors
      mergekit-wp stability seed0.safetensors seed1.safetensors seed2.safetensors
    """
    if len(set(others)) < len(others):
        raise UserError("a file is given twice")
    own = scorefile.read(file)
    found: list[Agreement] = [a for a in own.manifest.stability if a.against == "halves"]
    for path in others:
        found += compared(own, scorefile.read(path), path, seed)
    click.echo(table(found))
    if others:
        manifest = own.manifest.model_copy(update={"stability": tuple(found)})
        scorefile.write(replace(own, manifest=manifest), file)
        click.echo(f"\nwritten into {file}")


def compared(own: ScoreFile, other: ScoreFile, path: Path, seed: int) -> list[Agreement]:
    """Agreement of all scores that both files have.

    Raises:
        UserError: the very same scores, another architecture, or no scores in common; names the
            file.
    """
    import numpy as np

    from mergekit_wp.files.manifest import Agreement
    from mergekit_wp.statistics import between_files

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
    from mergekit_wp.files.fingerprint import NORM_TOLERANCE

    theirs = other.delta_norm
    return all(
        abs(norm - theirs[name]) <= NORM_TOLERANCE * norm for name, norm in own.delta_norm.items()
    )


def table(found: list[Agreement]) -> str:
    """One line per comparison and kind."""
    from mergekit_wp.report.agreement import cells, label
    from mergekit_wp.report.words import KIND_WORDS

    if not found:
        return "nothing to compare: no scores vary, or too few prompts for halves; give other files"
    rows = [(label(a), f"{a.estimand}/{a.criterion}", KIND_WORDS[a.kind], *cells(a)) for a in found]
    head = ("against", "scores", "kind", "rank correlation", "overlap")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )
