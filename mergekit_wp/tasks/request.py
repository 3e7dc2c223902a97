"""What is asked about the built-in behaviours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_wp.options import Argument, Request


class BehaviorsRequest(Request):
    """Everything `mergekit-wp behaviors` is asked for."""

    name: Annotated[str | None, Argument()] = Field(
        default=None, description="A built-in behaviour."
    )
    out: Path | None = Field(default=None, description="Prompt file to write (JSONL).")
    items: Path | None = Field(
        default=None,
        description="Items to write (JSONL): other requests, with the rule that checks an answer.",
    )
