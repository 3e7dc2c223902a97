"""What commands about all experts of a recipe are asked for."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mergekit_wp.prompts import PromptSource
from mergekit_wp.runs.command import RUN, command_of, options_of
from mergekit_wp.runs.request import RunRequest

#: steps of a company's guided path
PATH_STEPS = 10
#: steps of a fit of component gates
FIT_STEPS, FIT_RATE, GUARD_WEIGHT = 60, 0.1, 0.5


class MembersRequest(RunRequest):
    """What commands about all experts of a recipe are asked for.

    ``prompts`` pairs a name of an expert with its prompts.
    """

    recipe: Path
    prompts: tuple[tuple[str, PromptSource], ...]


class CompanyRequest(MembersRequest):
    """Everything `mergekit-wp score --company` is asked for.

    ``out`` is a folder; None writes nothing.
    """

    out: Path | None = None
    steps: int = Field(PATH_STEPS, ge=1)
    restart: bool = False


class FitRequest(MembersRequest):
    """Everything `mergekit-wp fit` is asked for.

    ``out`` is a folder; None writes nothing. ``start`` is "scores" or a number; ``held_out`` is the
    part of the prompts that is only looked at.
    """

    out: Path | None = None
    guards: tuple[PromptSource, ...] = ()
    guard_weight: float = Field(default=GUARD_WEIGHT, gt=0)
    start: str = "0.5"
    steps: int = Field(default=FIT_STEPS, ge=1)
    rate: float = Field(default=FIT_RATE, gt=0)
    prompts_a_step: int = Field(default=8, ge=1)
    held_out: float = Field(default=0.25, ge=0, lt=1)
    penalty: float = Field(default=0.01, ge=0)
    upper: float = Field(default=1.5, gt=0)
    restart: bool = False


@command_of.register
def _company(request: CompanyRequest) -> tuple[str, ...]:
    if not all(isinstance(prompts, Path) for _, prompts in request.prompts):
        return ()
    options = options_of(request, ("prompts", "steps", *RUN), {"steps": "share-steps"})
    return ("score", "--company", str(request.recipe), *options)


@command_of.register
def _fit(request: FitRequest) -> tuple[str, ...]:
    sources = (*(prompts for _, prompts in request.prompts), *request.guards)
    if not all(isinstance(source, Path) for source in sources):
        return ()
    objective = ("prompts", "guards", "guard_weight", "penalty", "upper")
    climb = ("start", "steps", "rate", "prompts_a_step", "held_out")
    run = tuple(name for name in RUN if name != "batch_size")
    options = options_of(request, (*objective, *climb, *run), {"guards": "guard"})
    return ("fit", str(request.recipe), *options)
