"""What commands about all experts of a recipe are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mergekit_wp.errors import option
from mergekit_wp.options import Argument, Option
from mergekit_wp.prompts import PromptSource
from mergekit_wp.runs.request import PROMPTS_OF_EACH, Restart, RunRequest
from mergekit_wp.terms import GateGranularity


class NamedExperts(BaseModel):
    """A base and its experts, each by a name of the caller's choice, where no recipe names them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str
    experts: tuple[tuple[str, str], ...]


class MembersRequest(RunRequest):
    """What commands about all experts of a recipe are asked for.

    ``prompts`` pairs a name of an expert with its prompts.
    """

    recipe: Annotated[Path | NamedExperts, Argument()] = Field(
        description="Names the base and its experts."
    )
    prompts: Annotated[tuple[tuple[str, PromptSource], ...], Option(metavar="EXPERT=SOURCE")] = (
        Field(description=PROMPTS_OF_EACH)
    )


class CompanyRequest(MembersRequest):
    """Everything `mergekit-wp score --company` is asked for.

    ``out`` is a folder; None writes nothing.
    """

    command: ClassVar[str] = "score"

    recipe: Annotated[Path | NamedExperts, Option(flag="company", metavar="RECIPE")] = Field(
        description="Instead of BASE and EXPERT: score all experts of a recipe together, for "
        "merging them with `fusion: path`."
    )
    out: Annotated[Path | None, Option(path="any")] = Field(
        default=None,
        description="Folder for a score file of every expert, and a recipe that merges by them.",
    )
    path_steps: int = Field(
        default=10, ge=1, description=f"With {option('recipe')}, steps of the guided path."
    )
    restart: Restart = False


class FitRequest(MembersRequest):
    """Everything `mergekit-wp fit` is asked for.

    ``out`` is a folder; None writes nothing. ``start`` is "scores" or a number; ``held_out`` is the
    part of the prompts that is only looked at.
    """

    command: ClassVar[str] = "fit"

    out: Annotated[Path | None, Option(path="folder")] = Field(
        default=None,
        description="Folder to write into: a score file for each expert, and a recipe that merges "
        "by them. A killed run goes on where it was.",
    )
    guards: Annotated[
        tuple[PromptSource, ...], Option(flag="guard", metavar="SOURCE", path="any")
    ] = Field(
        default=(),
        description="Prompts on which the merge is to stay like the base; may be given several "
        "times. Without any, a few lines of plain text that the package brings are the guard.",
    )
    unguarded: bool = Field(default=False, description="Fit without any guard.")
    limit: float = Field(
        default=1.01,
        gt=1,
        description="What guards allow: how many times the base's perplexity the merge may have "
        "there, on what the base itself would write.",
    )
    granularity: GateGranularity = Field(
        default="channel",
        description="What one gate covers: a whole component, each of its slices of a matrix, one "
        "channel (a row or a column of a slice, an entry of a norm), or a row and a column of a "
        "matrix, whose gates are added.",
    )
    shrinkage: float = Field(
        default=16.0,
        ge=0,
        description="Pull of every gate towards the mean of its tensor, as strong as so many "
        "prompts a behaviour: with few prompts gates move together, with many each by itself.",
    )
    upper: float = Field(default=1.5, gt=0, description="Largest gate; the smallest is 0.")
    start: Annotated[str, Option(metavar="NUMBER|scores")] = Field(
        default="0.5",
        description="Gates to start from: one number, or those by which RECIPE merges. To go on "
        f"from an earlier fit, give its recipe and {option('start', 'scores')}.",
    )
    steps: int = Field(
        default=600, ge=1, description="Most steps; a fit ends when there is nothing more to gain."
    )
    rate: float = Field(
        default=0.05,
        gt=0,
        description="How far a gate moves in the first step, about; it falls to a third, twice, "
        "where nothing is gained any more.",
    )
    prompts_a_step: int = Field(
        default=16, ge=1, description="Prompts of every behaviour in one step."
    )
    held_out: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="Part of the prompts that is only judged by, where a behaviour has at least 64 "
        "of them, and 128 at most. With fewer, the fit is judged by what it is fitted on.",
    )
    restart: Restart = False
