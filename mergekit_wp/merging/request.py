"""What is asked about merges themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_wp.options import Argument, Option, Request
from mergekit_wp.prompts.request import SOURCE
from mergekit_wp.runs.request import CALIBRATION, REFERENCE, BatchSize, Device, Overwrite


class MergeRequest(Request):
    """What `mergekit-wp merge` is asked for beside mergekit's own options."""

    what: Annotated[tuple[str, ...], Argument(repeated=True)] = Field(
        description="A mergekit recipe and the folder for the model; or a base and its experts."
    )
    out: Annotated[Path | None, Option(path="any", default="the last argument")] = Field(
        default=None, description="Folder for the merged model."
    )
    overwrite: Overwrite = False


class AimRequest(Request):
    """Everything `mergekit-wp aim` is asked for."""

    merged: Annotated[str, Argument()] = Field(description=f"The merge: {REFERENCE}.")
    out: Annotated[Path, Option(path="any")] = Field(description="Folder for the model.")
    base: str = Field(description=f"The base model: {REFERENCE}.")
    calibration: Annotated[Path, SOURCE] = Field(description=CALIBRATION)
    omega: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="How much of the change stays in the base's most active channel; 1 changes "
        "nothing.",
    )
    batch_size: BatchSize = None
    device: Device = Field(default="auto", validate_default=True)
    overwrite: Overwrite = False
