"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_RUNNING = (
    click.option("--max-prompts", type=click.IntRange(min=1), metavar="N", help="Use the first N."),
    click.option("--batch-size", type=click.IntRange(min=1), help="[default: auto]"),
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
