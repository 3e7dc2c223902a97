"""What is asked of a score file that exists, and of anchors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from mergekit_wp.files.circuitfile import Rules
from mergekit_wp.prompts import PromptSource
from mergekit_wp.runs.command import RUN, command_of, options_of
from mergekit_wp.runs.request import RunRequest
from mergekit_wp.terms import CriterionName, Estimand


class RescoreRequest(RunRequest):
    """What commands that take a score file, and measure its models again, are asked for.

    ``behavior`` names the built-in one that ``prompts`` hold, if it is one.
    """

    file: Path
    prompts: PromptSource
    behavior: str | None = None
    base: str | None = None
    expert: str | None = None
    criterion: CriterionName | None = None
    restart: bool = False


class VerifyRequest(RescoreRequest):
    """Everything `mergekit-wp verify` is asked for; ``top`` are sizes of sets.

    ``task`` and ``checkers`` are where its items and their checkers lie, if the user named them.
    """

    top: tuple[str, ...]
    estimand: Estimand | None = None
    draws: int = Field(5, ge=2)
    task: Path | None = None
    checkers: Path | None = None


class TraceRequest(RescoreRequest):
    """Everything `mergekit-wp trace` is asked for.

    ``targets``: components whose suppliers are looked for; ``suppliers``: of each, how many are
    measured exactly by weights and by activations, and as many random ones. ``out``: None writes
    nothing.
    """

    out: Path | None = None
    targets: int = Field(12, ge=1)
    suppliers: int = Field(8, ge=1)
    rules: Rules = Rules()


class AnchorRequest(RunRequest):
    """Everything `mergekit-wp anchor` is asked for."""

    base: str
    expert: str
    prompts: PromptSource
    strength: float = Field(1.0, gt=0)


@command_of.register
def _verify(request: VerifyRequest) -> tuple[str, ...]:
    if not isinstance(request.prompts, Path):
        return ()
    own = ("top", "task", "checkers", "estimand", "draws")
    return ("verify", *_rescored(request, own))


@command_of.register
def _trace(request: TraceRequest) -> tuple[str, ...]:
    if not isinstance(request.prompts, Path):
        return ()
    rules = options_of(request.rules, tuple(Rules.model_fields), {"suppliers": "min_suppliers"})
    own = _rescored(request, ("targets", "suppliers"))
    return ("trace", str(request.file), *own, *rules)


def _rescored(request: RescoreRequest, own: tuple[str, ...]) -> Iterator[str]:
    prompts = "prompts" if request.behavior is None else "behavior"
    return options_of(request, (prompts, *own, "base", "expert", "criterion", *RUN), {})
