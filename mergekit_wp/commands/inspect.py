"""``mergekit-wp inspect``: what a score file says, as a table or as JSON."""

from __future__ import annotations

import shutil
import sys

import click

from mergekit_wp.files.scorefile import read
from mergekit_wp.report.ranking import select, to_json
from mergekit_wp.report.table import render
from mergekit_wp.terms import ESTIMANDS, KINDS

_DEFAULT_TOP = 20


@click.command(short_help="Show what a score file says.")
@click.argument("file", type=click.Path())
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Leaders to show for each estimand and criterion [default: {_DEFAULT_TOP}]; with "
    "--json the length of the whole list [default: all].",
)
@click.option("--estimand", type=click.Choice(ESTIMANDS), help="Only this estimand.")
@click.option("--criterion", metavar="NAME", help="Only this criterion.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    help="Only components of this kind. Without it heads, K/V groups, neurons and the remaining "
    "tensors are ranked together, so that no weight is listed twice.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def inspect(
    file: str,
    top: int | None,
    estimand: str | None,
    criterion: str | None,
    kind: str | None,
    as_json: bool,
) -> None:
    """Show what score FILE says: a summary, how far to trust it, and the leading components.

    A score of 1 means: this component alone does all that the expert does beyond the base, by
    the criterion; 0: nothing; below 0: it works against the behaviour. `share` adds up to 1 over
    the model, `gain` swaps one component into the base, `knockout` takes one out of the expert.
    Scores under the noise floor mean nothing.

    \b
    Examples:
      mergekit-wp inspect caps.safetensors
      mergekit-wp inspect caps.safetensors --estimand gain --kind head --top 50
      mergekit-wp inspect caps.safetensors --json | jq '.components[0]'

    JSON: {"manifest": {...}, "components": [{"kind", "layer", "index", "name", "estimand",
    "criterion", "score"}, ...]}, highest score first; layer is null outside the layers.
    """
    score_file = read(file)
    selection = select(score_file, estimand, criterion, kind)
    if as_json:
        for piece in to_json(score_file, selection, top):
            click.echo(piece, nl=False)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in render(score_file, selection, top or _DEFAULT_TOP, width=width):
        click.echo(line)
