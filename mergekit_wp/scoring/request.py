"""What a scoring run is asked for, and where it reports how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from mergekit_wp.components import KINDS, Kind
from mergekit_wp.roles import Rules
from mergekit_wp.scorefile import CriterionName, Estimand

#: a kind is swapped exactly when that costs at most this many forward passes over the prompts
EXACT_BUDGET = 256.0
#: midpoints of the share integral, and steps of a company's guided path
SHARE_STEPS, PATH_STEPS = 5, 10
#: steps of a fit of component gates
FIT_STEPS, FIT_RATE, GUARD_WEIGHT = 60, 0.1, 0.5
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTypeName = Literal["float32", "float64", "bfloat16", "float16"]


class RunRequest(BaseModel):
    """How to run: what every command that measures models is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_prompts: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    dtype: DTypeName = "float32"
    device: str = "cpu"
    seed: int = 0
    max_new_tokens: int = Field(64, ge=1)


class ScoreRequest(RunRequest):
    """Everything `mergekit-wp score` is asked for; see its ``--help``.

    ``max_memory``: of weights on each device, see `placement`; None for all of them on `device`.
    """

    base: str
    expert: str
    prompts: Path
    out: Path
    behavior: str | None = None
    estimands: tuple[Estimand, ...] = ("share", "gain")
    criteria: tuple[CriterionName, ...] | None = None
    kinds: tuple[Kind, ...] = KINDS
    anchor_layer: int | None = None
    verify: int = Field(32, ge=0)
    restart: bool = False
    share_steps: int = Field(SHARE_STEPS, ge=1)
    exact_budget: float = EXACT_BUDGET
    ray: bool = False
    max_memory: dict[str, int] | None = None


class MembersRequest(RunRequest):
    """What commands about all experts of a recipe are asked for.

    ``prompts`` pairs a name of an expert with its prompt file.
    """

    recipe: Path
    prompts: tuple[tuple[str, Path], ...]


class CompanyRequest(MembersRequest):
    """Everything `mergekit-wp score --company` is asked for; ``out`` is a folder."""

    out: Path
    steps: int = Field(PATH_STEPS, ge=1)
    restart: bool = False


class FitRequest(MembersRequest):
    """Everything `mergekit-wp fit` is asked for.

    ``start`` is "scores", a number, or the path of a gates file; ``held_out`` is the part of the
    prompts that is only looked at.
    """

    out: Path
    guards: tuple[Path, ...] = ()
    guard_weight: float = Field(default=GUARD_WEIGHT, gt=0)
    start: str = "0.5"
    steps: int = Field(default=FIT_STEPS, ge=1)
    rate: float = Field(default=FIT_RATE, gt=0)
    prompts_a_step: int = Field(default=8, ge=1)
    held_out: float = Field(default=0.25, ge=0, lt=1)
    penalty: float = Field(default=0.01, ge=0)
    upper: float = Field(default=1.5, gt=0)
    restart: bool = False


class RescoreRequest(RunRequest):
    """What commands that take a score file, and measure its models again, are asked for.

    ``behavior`` names the built-in one that ``prompts`` hold, if it is one.
    """

    file: Path
    prompts: Path
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
    measured exactly by weights and by activations, and as many random ones.
    """

    out: Path
    targets: int = Field(12, ge=1)
    suppliers: int = Field(8, ge=1)
    rules: Rules = Rules()


class Progress(Protocol):
    """Where a run reports how far it is."""

    def stage(self, name: str, total: float, unit: str) -> None:
        """A new stage of `total` units begins."""

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Units done; `resumed` ones were done by an earlier run."""

    def note(self, text: str) -> None:
        """Something the user should know."""
