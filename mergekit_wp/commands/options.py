"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from mergekit_wp.errors import UserError
from mergekit_wp.terms import CRITERIA

_RUNNING = (
    click.option("--max-prompts", type=click.IntRange(min=1), metavar="N", help="Use the first N."),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Sequences per forward pass.  [default: auto]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Of weights and activations.",
    ),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random draws."),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Length of the expert's own answers, where the file gives no response.",
    ),
)


def running(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for how models are run, in this order in ``--help``."""
    for option in reversed(_RUNNING):
        command = option(command)
    return command


_RESCORED = (
    click.option("--base", help="The base model.  [default: the file's]"),
    click.option("--expert", help="The expert.  [default: the file's]"),
    click.option(
        "--criterion",
        type=click.Choice(CRITERIA),
        help="What to measure by.  [default: the file's first]",
    ),
)
_PROMPTS = (
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Prompt file, as for `score`.",
    ),
    click.option("--behavior", help="Instead of --prompts: a built-in behaviour, see `behaviors`."),
)


def rescored(command: Callable[..., Any]) -> Callable[..., Any]:
    """The models of a score file, and one of its criteria."""
    for option in reversed(_RESCORED):
        command = option(command)
    return command


def prompted(command: Callable[..., Any]) -> Callable[..., Any]:
    """Either ``--prompts`` or ``--behavior``; `prompt_file` makes one of the two."""
    for option in reversed(_PROMPTS):
        command = option(command)
    return command


@contextmanager
def prompt_file(prompts: Path | None, behavior: str | None) -> Iterator[Path]:
    """The prompt file that was given, or one of a built-in behaviour while the context lasts.

    Raises:
        UserError: neither is given, or both; no such behaviour.
    """
    from mergekit_wp.tasks import behaviors

    if (prompts is None) == (behavior is None):
        raise UserError("give either --prompts FILE.jsonl or --behavior NAME")
    if prompts is not None:
        yield prompts
        return
    assert behavior is not None
    with TemporaryDirectory() as scratch:
        path = Path(scratch, f"{behavior}.jsonl")
        path.write_text(behaviors.jsonl(behaviors.behavior(behavior).prompts()))
        yield path
