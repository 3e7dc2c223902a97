"""The commands behind a file, and what they need that is not here."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.manifest import Manifest, ModelId
from mergekit_wp.prompts import prompt_source, read_prompts
from mergekit_wp.tasks import behaviors


@dataclass(frozen=True)
class Step:
    """A command with its output, and what the file says was there when it ran."""

    command: tuple[str, ...]
    prompts: frozenset[str]  # by sha256
    versions: dict[str, str]
    created: str | None = None
    models: tuple[ModelId, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """How a file is made again.

    Attributes:
        commands: lines for a shell, one after the other.
        notes: what they need that is not here, and what they do not make.
    """

    commands: tuple[str, ...]
    notes: tuple[str, ...]


def reproduce(file: Path) -> Reproduction:
    """The commands that make a score or trace file again, byte for byte.

    Raises:
        UserError: no such file, or one that does not say how it was made.
    """
    if circuitfile.is_trace_file(file):
        trace = circuitfile.read(file)
        steps, notes = [_traced(trace, file)], list(_other_scores(trace))
    else:
        manifest = scorefile.read(file).manifest
        steps, notes = list(_scored(manifest, file)), []
        if any(found.against != "halves" for found in manifest.stability):
            notes.append("what 'stability' added is not made again")
    notes += [note for step in steps for note in _notes(step)]
    return Reproduction(tuple(command_line(step) for step in steps), tuple(dict.fromkeys(notes)))


def _stated(command: tuple[str, ...], file: Path) -> tuple[str, ...]:
    if not command:
        raise UserError(f"{file} does not say by which command it was made")
    return command


def _scored(manifest: Manifest, file: Path) -> Iterator[Step]:
    command = _stated(manifest.command, file)
    out = file if manifest.company is None else file.parent
    yield Step(
        command=(*command, "--out", str(out)),
        # a company's file knows only its own prompts, and the guards of its fit
        prompts=frozenset(manifest.known_prompts),
        versions=manifest.versions,
        created=manifest.created,
        models=(manifest.base, manifest.expert),
    )
    found = manifest.verification
    if found is not None:
        verb, *options = _stated(found.command, file)
        prompts = frozenset({found.prompts_sha256})
        command = (verb, str(file), *options)
        yield Step(command, prompts, found.versions, found.template_date)


def _traced(trace: TraceFile, file: Path) -> Step:
    command = (*_stated(trace.command, file), "--out", str(file))
    return Step(command, frozenset({trace.prompts_sha256}), trace.versions, trace.template_date)


def _other_scores(trace: TraceFile) -> Iterator[str]:
    try:
        there = scorefile.read(trace.command[1]).digest() == trace.scores_sha256
    except (IndexError, UserError):
        there = False
    if not there:
        yield f"no score file whose scores have sha256 {trace.scores_sha256} is here"


def command_line(step: Step) -> str:
    """For a shell, with the date of the file where it has one.

    Raises:
        UserError: the date is none.
    """
    line = f"mergekit-wp {shlex.join(step.command)}"
    if step.created is None:
        return line
    try:
        day = datetime.datetime.fromisoformat(step.created).replace(tzinfo=datetime.UTC)
    except ValueError as error:
        raise UserError(f"created: '{step.created}' is no date") from error
    return f"SOURCE_DATE_EPOCH={int(day.timestamp())} {line}"


def _notes(step: Step) -> Iterator[str]:
    for sha256 in step.prompts - set(_prompts_here(step.command)):
        yield f"no prompts with sha256 {sha256} are here"
    for model in step.models:
        if model.revision and "@" not in model.reference:
            yield f"{model.reference} was read at commit {model.revision}"
    for package, used in step.versions.items():
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "not installed"
        if here != used:
            yield f"made with {package} {used}; here it is {here}"


def _prompts_here(command: tuple[str, ...]) -> Iterator[str | None]:
    """Hashes of the prompts that a command names: files, or a built-in behaviour's."""
    for option, value in pairwise(command):
        if option in ("--prompts", "--guard"):
            yield from (_sha256(Path(part)) for part in (value, value.partition("=")[2]) if part)
        elif option == "--builtin":
            prompts = prompt_source(behaviors.behavior(value).prompts())
            yield read_prompts(prompts, None).sha256


def _sha256(source: Path) -> str | None:
    """Of the prompts that are there now, None where there are none that can be read."""
    try:
        return read_prompts(source, None).sha256
    except UserError:
        return None
