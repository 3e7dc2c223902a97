"""What commands show while they run: a bar and notes; not what libraries say of themselves."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable
from pathlib import Path

import click

from mergekit_wp.commands.derive import flags
from mergekit_wp.runs.progress import BarProgress


def progress() -> BarProgress:
    """A bar whose notes name options by the present command's flags; libraries fall silent."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its retries are not our one line
    return BarProgress(flags(click.get_current_context().command))


def merge_by(folder: Path, experts: Iterable[str]) -> str:
    """What was written of experts that were scored or fitted together, and what to do with it."""
    from mergekit_wp.joint.files import RECIPE

    command = shlex.join(["mergekit-wp", "merge", str(folder / RECIPE)])
    files = ", ".join(str(folder / f"{name}.safetensors") for name in experts)
    return f"{files} written; merge by them with: {command} OUT"
