"""`mergekit-wp reproduce`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.runs.request import ReproduceRequest


@click.command(cls=OnceEach, short_help="Print the command that made a score or trace file.")
@options_of(ReproduceRequest)
def reproduce(file: Path) -> None:
    """Print the command that makes the score or trace FILE again, byte for byte.

    Every option that the numbers depend on is in it, and the date that the file states; it writes
    to FILE. Where `verify` wrote into a score file, its command follows. Run it in the folder
    where the file was made, or change its paths. On stderr: what it needs that this machine does
    not have (the prompt files by content, the versions, the commits of Hub models, the scores that
    were traced), and that what `stability` added to a score file is not made again.

    \b
      mergekit-wp reproduce expert.safetensors > again.sh && sh again.sh
    """
    from mergekit_wp.runs.reproduce import reproduce as run

    found = run(file)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(" &&\n".join(found.commands))
