"""`mergekit-wp reproduce`."""

from __future__ import annotations

import datetime
import hashlib
import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit_wp.gatesfile import GatesManifest
    from mergekit_wp.scorefile import Manifest


@click.command(short_help="Print the command that made a score file or gates file.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def reproduce(file: Path) -> None:
    """Print the command that makes the score or gates FILE again, byte for byte.

    Every option that the numbers depend on is in it, and the date that the file states; it writes
    to FILE. Run it in the folder where the file was made, or change its paths. On stderr: what it
    needs that this machine does not have (the prompt files by content, the versions, the commits
    of Hub models). What `verify` and `stability` added to a score file later is not made again.

    \b
      mergekit-wp reproduce expert.safetensors > again.sh && sh again.sh
    """
    from mergekit_wp import gatesfile, scorefile
    from mergekit_wp.errors import UserError

    manifest: Manifest | GatesManifest
    if gatesfile.is_gates_file(file):
        manifest = gatesfile.read(file).manifest
    else:
        manifest = scorefile.read(file).manifest
    if not manifest.command:
        raise UserError(f"{file} does not say by which command it was made")
    for note in _notes(manifest):
        click.echo(f"note: {note}", err=True)
    out = file.parent if "--company" in manifest.command else file
    click.echo(command_line(manifest.created, (*manifest.command, "--out", str(out))))


def command_line(created: str, command: tuple[str, ...]) -> str:
    """For a shell, with the date of the file.

    Raises:
        UserError: the date is none.
    """
    from mergekit_wp.errors import UserError

    try:
        day = datetime.datetime.fromisoformat(created).replace(tzinfo=datetime.UTC)
    except ValueError as error:
        raise UserError(f"created: '{created}' is no date") from error
    return f"SOURCE_DATE_EPOCH={int(day.timestamp())} mergekit-wp {shlex.join(command)}"


def _notes(manifest: Manifest | GatesManifest) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    from mergekit_wp.gatesfile import GatesManifest

    notes = []
    if isinstance(manifest, GatesManifest):
        wanted = {expert.prompts_sha256 for expert in manifest.experts}
        wanted |= {guard.prompts_sha256 for guard in manifest.guards}
        models = [manifest.base, *(expert.model for expert in manifest.experts)]
    else:
        # a company's file knows only its own prompts
        wanted = {manifest.prompts_sha256}
        models = [manifest.base, manifest.expert]
    given = {_sha256(path) for path in _files(manifest.command)}
    notes += [f"no prompt file with sha256 {sha256} is here" for sha256 in wanted - given]
    notes += [
        f"{model.reference} was read at commit {model.revision}"
        for model in models
        if model.revision and "@" not in model.reference
    ]
    for package, used in manifest.versions.items():
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "not installed"
        if here != used:
            notes.append(f"made with {package} {used}; here it is {here}")
    return notes


def _files(command: tuple[str, ...]) -> list[Path]:
    after = [b for a, b in pairwise(command) if a in ("--prompts", "--guard")]
    return [Path(part) for text in after for part in (text, text.partition("=")[2]) if part]


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return None
