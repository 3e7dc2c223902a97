"""Asking for a plan alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mergekit_wp.options import Option, Request


class DryRunRequest(Request):
    """Beside what a command is asked for."""

    dry_run: Annotated[bool, Option(stored=False)] = Field(
        default=False,
        description="Check all inputs, print what the command would take (FLOPs, bytes read, "
        "memory, disk, time), and stop: nothing is written.",
    )
