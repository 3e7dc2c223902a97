"""What is asked of a score file that exists, and of anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, ValidationInfo

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.circuitfile import Rules
from mergekit_wp.options import Argument, Option, Request
from mergekit_wp.prompts.request import SOURCE, Prompts
from mergekit_wp.runs.request import (
    REFERENCE,
    CheckersFile,
    PairRequest,
    Restart,
    RunRequest,
    Seed,
)
from mergekit_wp.tasks import behaviors
from mergekit_wp.tasks.behaviors import jsonl
from mergekit_wp.terms import BuiltInCriterion, Estimand


def _is_file_of(prompts: Any, name: str) -> bool:
    try:
        own = jsonl(behaviors.behavior(name).prompts())
        return isinstance(prompts, Path) and prompts.read_text(encoding="utf-8") == own
    except (OSError, UnicodeDecodeError):  # a source of another kind, or none
        return False


def _of_its_prompts(name: str | None, info: ValidationInfo) -> str | None:
    """A file keeps the name in place of its prompts, which have to be that behaviour's."""
    if name is not None and not _is_file_of(info.data.get("prompts"), name):
        raise UserError(
            f"{option('builtin', name)} is of the command line; from Python give its prompts, "
            f"which `mergekit-wp behaviors {name}` writes, as {option('prompts')}"
        )
    return name


BuiltIn = Annotated[
    str | None,
    Option(instead_of="prompts", metavar="NAME"),
    Field(description=f"Instead of {option('prompts')}: a built-in behaviour, see `behaviors`."),
    AfterValidator(_of_its_prompts),
]


class RescoreRequest(RunRequest):
    """What commands that take a score file, and measure its models again, are asked for.

    ``builtin`` names the built-in behaviour that ``prompts`` hold, if it is one.
    """

    file: Annotated[Path, Argument()] = Field(description="A score file.")
    prompts: Prompts
    builtin: BuiltIn = None
    base: Annotated[str | None, Option(default="the file's")] = Field(
        default=None, description=f"The base model: {REFERENCE}."
    )
    expert: Annotated[str | None, Option(default="the file's")] = Field(
        default=None, description=f"The expert: {REFERENCE}, or MODEL+ADAPTER."
    )
    criterion: Annotated[BuiltInCriterion | None, Option(default="the file's first")] = Field(
        default=None, description="What to measure by."
    )
    restart: Restart = False


class VerifyRequest(RescoreRequest):
    """Everything `mergekit-wp verify` is asked for; its result goes into the file."""

    command: ClassVar[str] = "verify"
    writes: ClassVar[str] = "file"

    top: Annotated[tuple[str, ...], Option(metavar="K[,K...]")] = Field(
        description="Sizes of the sets: counts of components, or parts such as 1%,5%,20%. mib "
        "stands for 0.1,0.2,0.5,1,2,5,10,20,50%; with these, CPR and CMD of the MIB benchmark are "
        "printed, too."
    )
    task: Annotated[Path | None, SOURCE] = Field(
        default=None,
        description="Items, as for `compare`: how many test answers are right is measured, "
        f"too. With {option('builtin')} its own items are taken, checked by the IFEval rule.",
    )
    checkers: CheckersFile = None
    estimand: Annotated[Estimand | None, Option(default="first")] = Field(
        default=None, description="Scores to rank by."
    )
    draws: int = Field(default=5, ge=2, description="Random sets of every size.")


class TraceRequest(RescoreRequest):
    """Everything `mergekit-wp trace` is asked for."""

    command: ClassVar[str] = "trace"

    out: Path | None = Field(
        default=None,
        description="JSON to write; `plot` draws it. A killed run goes on where it was.",
    )
    targets: int = Field(
        default=12,
        ge=1,
        description="Components whose suppliers are looked for: those with the largest "
        "activation_gain.",
    )
    suppliers: int = Field(
        default=8,
        ge=1,
        description="Suppliers of each target to measure exactly, by weights and by activations; "
        "as many random ones judge the first-order screen.",
    )
    rules: Rules = Rules()


class AnchorRequest(PairRequest):
    """Everything `mergekit-wp anchor` is asked for."""

    command: ClassVar[str] = "anchor"

    prompts: Prompts
    builtin: BuiltIn = None
    strength: float = Field(default=1.0, gt=0, description="Factor on the added vector.")


class StabilityRequest(Request):
    """Everything `mergekit-wp stability` is asked for."""

    file: Annotated[Path, Argument()] = Field(description="A score file.")
    others: Annotated[tuple[Path, ...], Argument()] = Field(
        default=(), description="Score files of the same architecture to compare it with."
    )
    seed: Seed = 0
