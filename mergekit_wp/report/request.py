"""What is asked about a file that exists: to show, draw or make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_wp.errors import option
from mergekit_wp.files.manifest import DRAWS
from mergekit_wp.options import Argument, Option, PrintRequest, Request
from mergekit_wp.terms import CriterionName, Estimand, Kind

#: leaders that a table has
TOP = 20
#: a component leads stably in at least this part of the draws
LEADING = 0.95


class InspectRequest(PrintRequest):
    """Everything `mergekit-wp inspect` is asked for."""

    file: Annotated[str, Argument()] = Field(description="A score file, here or on the Hub.")
    top: Annotated[
        int | None, Option(metavar="N", default=f"{TOP}; with {option('as_json')} all of them")
    ] = Field(
        default=None,
        ge=1,
        description="Leaders to show for each estimand and criterion; with "
        f"{option('as_json')} the length of the whole list.",
    )
    estimand: Estimand | None = Field(default=None, description="Only this estimand.")
    criterion: Annotated[CriterionName | None, Option(metavar="NAME")] = Field(
        default=None, description="Only this criterion."
    )
    kind: Annotated[Kind | None, Option(also="kinds")] = Field(
        default=None,
        description="Only components of this kind. Without it heads, K/V groups, neurons and the "
        "remaining tensors are ranked together, so that no weight is listed twice.",
    )
    stable: bool = Field(
        default=False,
        description=f"Only components that lead in at least {LEADING:.0%} of {DRAWS} bootstrap "
        "draws over the prompts: that are then among the top 1% of their kind, five at least.",
    )


class PlotRequest(Request):
    """Everything `mergekit-wp plot` is asked for."""

    file: Annotated[str, Argument()] = Field(description="A score file, here or on the Hub.")
    out: Path = Field(
        description="What to write: FILE.png or FILE.html. An existing file is replaced."
    )
    trace: Path | None = Field(
        default=None, description="What `trace` wrote for FILE: draws the circuit into the .html."
    )
