"""What commands share: the prompts they are given, what they show while they run and at the end."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mergekit_wp.commands.derive import flags
from mergekit_wp.errors import UserError, option, spelled
from mergekit_wp.runs.progress import BarProgress

if TYPE_CHECKING:
    from mergekit_wp.costs.work import Costs


def progress(
    dry_run: bool = False, then: Callable[[Any], Costs | None] = lambda _: None
) -> BarProgress:
    """A bar whose notes name options by the present command's flags; libraries fall silent.

    Args:
        dry_run: end the command where it would begin to compute, and print what it would take.
        then: what the command takes after what is opened, if anything.
    """
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its retries are not our one line
    said = partial(_planned, dry_run=dry_run, then=then)
    return BarProgress(flags(click.get_current_context().command), said)


def _planned(opened: Any, *, dry_run: bool, then: Callable[[Any], Costs | None]) -> str | None:
    """The line before a run, where it is worth one; a dry run prints its plan and ends here."""
    if dry_run:
        opened.check()
        show_plan(opened, then(opened))
    try:
        from mergekit_wp.costs.forecast import counted, forecast, worth_a_line
        from mergekit_wp.costs.shown import line

        costs = counted(opened)
        if (more := then(opened)) is not None:
            costs = costs.then(more)
        budget = worth_a_line(opened, costs)
        return line(forecast(opened, costs, budget)) if budget else costs.said or None
    except Exception as error:  # whatever a model's modules raise: the run itself does not need it
        return f"what this will cost could not be told ({type(error).__name__}: {error})"


def show_plan(opened: Any, more: Costs | None = None) -> NoReturn:
    """Print what a command would take, and end it."""
    from mergekit_wp.costs.forecast import counted, forecast
    from mergekit_wp.costs.shown import table

    costs = counted(opened)
    found = forecast(opened, costs if more is None else costs.then(more))
    flagged = flags(click.get_current_context().command)
    click.echo(table(found, lambda said: spelled(said, flagged)))
    click.get_current_context().exit()


@contextmanager
def prompt_file(options: Mapping[str, Any]) -> Iterator[Path]:
    """The prompt file that was given, or one of a built-in behaviour while the context lasts.

    Raises:
        UserError: neither is given, or both; no such behaviour.
    """
    from mergekit_wp.tasks import behaviors

    prompts, builtin = options["prompts"], options["builtin"]
    if (prompts is None) == (builtin is None):
        raise UserError(
            f"give either {option('prompts', 'FILE.jsonl')} or {option('builtin', 'NAME')}"
        )
    if prompts is not None:
        yield prompts
        return
    assert builtin is not None
    with TemporaryDirectory() as scratch:
        path = Path(scratch, f"{builtin}.jsonl")
        lines = behaviors.behavior(builtin).prompts()
        path.write_text(behaviors.jsonl(lines), encoding="utf-8")
        yield path


def merge_by(folder: Path, experts: Iterable[str]) -> str:
    """What was written of experts that were fitted together, and what to do with it."""
    from mergekit_wp.joint.files import RECIPE

    command = shlex.join(["mergekit-wp", "merge", str(folder / RECIPE)])
    files = ", ".join(str(folder / f"{name}.safetensors") for name in experts)
    return f"{files} written; merge by them with: {command} OUT"
