"""``mergekit-wp inspect``: what a score file says, as a table or as JSON."""

from __future__ import annotations

import shutil
import sys

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.files.scorefile import read
from mergekit_wp.models.hub import local_path
from mergekit_wp.report.ranking import select, to_json
from mergekit_wp.report.request import TOP, InspectRequest
from mergekit_wp.report.table import render


@click.command(cls=OnceEach, short_help="Show what a score file says.")
@options_of(InspectRequest)
def inspect(
    file: str,
    top: int | None,
    estimand: str | None,
    criterion: str | None,
    kind: str | None,
    stable: bool,
    as_json: bool,
) -> None:
    """Show what score FILE says: a summary, how far to trust it, and the leading components.

    A score of 1 means: this component alone does all that the expert does beyond the base, by
    the criterion; 0: nothing; below 0: it works against the behaviour. `share` adds up to 1 over
    the model, `gain` swaps one component into the base, `knockout` takes one out of the expert.
    Scores under the noise floor mean nothing. Single components change with the prompts: `--stable`
    leaves those that would lead by most draws of them.

    \b
    Examples:
      mergekit-wp inspect caps.safetensors
      mergekit-wp inspect caps.safetensors --estimand gain --kind head --top 50
      mergekit-wp inspect caps.safetensors --stable --top 100
      mergekit-wp inspect caps.safetensors --json | jq '.components[0]'

    JSON: {"manifest": {...}, "components": [{"kind", "layer", "index", "name", "estimand",
    "criterion", "score", "se"}, ...]}, highest score first; layer is null outside the layers, se
    (the standard error over prompts) where it is not known.
    """
    score_file = read(local_path(file))
    selection = select(score_file, estimand, criterion, kind, stable)
    if as_json:
        for piece in to_json(score_file, selection, top):
            click.echo(piece, nl=False)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in render(score_file, selection, top or TOP, width=width):
        click.echo(line)
