"""What commands share: the prompts they are given, what they show while they run and at the end."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from mergekit_wp.commands.derive import flags
from mergekit_wp.errors import UserError, option
from mergekit_wp.runs.progress import BarProgress


def progress() -> BarProgress:
    """A bar whose notes name options by the present command's flags; libraries fall silent."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its retries are not our one line
    return BarProgress(flags(click.get_current_context().command))


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
        path.write_text(behaviors.jsonl(behaviors.behavior(builtin).prompts()))
        yield path


def merge_by(folder: Path, experts: Iterable[str]) -> str:
    """What was written of experts that were scored or fitted together, and what to do with it."""
    from mergekit_wp.joint.files import RECIPE

    command = shlex.join(["mergekit-wp", "merge", str(folder / RECIPE)])
    files = ", ".join(str(folder / f"{name}.safetensors") for name in experts)
    return f"{files} written; merge by them with: {command} OUT"
