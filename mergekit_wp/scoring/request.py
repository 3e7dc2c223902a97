"""What a scoring run is asked for, and where it reports how far it is."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mergekit_wp.criteria import CriterionFunction
from mergekit_wp.prompts import PromptSource
from mergekit_wp.runs.command import RUN, command_of, options_of
from mergekit_wp.runs.request import RunRequest
from mergekit_wp.terms import KINDS, BuiltInCriterion, Estimand, Kind

#: a kind is swapped exactly when that costs at most this many forward passes over the prompts
EXACT_BUDGET = 256.0
#: midpoints of the share integral
SHARE_STEPS = 5


class ScoreRequest(RunRequest):
    """Everything `mergekit-wp score` is asked for; see its ``--help``.

    ``criteria``: by name, or functions of the caller's, see `criteria.CriterionFunction`.
    ``out``: None writes nothing. ``max_memory``: of weights on each device, see `placement`; None
    for all of them on `device`.
    """

    base: str
    expert: str
    prompts: PromptSource
    out: Path | None = None
    behavior: str | None = None
    estimands: tuple[Estimand, ...] = ("share", "gain")
    criteria: tuple[BuiltInCriterion | CriterionFunction, ...] | None = None
    kinds: tuple[Kind, ...] = KINDS
    anchor_layer: int | None = None
    verify: int = Field(32, ge=0)
    restart: bool = False
    share_steps: int = Field(SHARE_STEPS, ge=1)
    exact_budget: float = EXACT_BUDGET
    ray: bool = False
    max_memory: dict[str, int] | None = None


@command_of.register
def _score(request: ScoreRequest) -> tuple[str, ...]:
    functions = any(not isinstance(criterion, str) for criterion in request.criteria or ())
    if functions or not isinstance(request.prompts, Path):
        return ()  # no command has a caller's function, or prompts that are in no file
    names = {"estimands": "estimand", "criteria": "criterion"}
    own = ("prompts", "behavior", "estimands", "criteria", "kinds", "anchor_layer", "verify")
    options = options_of(request, (*own, "share_steps", *RUN), names)
    return ("score", request.base, request.expert, *options)
