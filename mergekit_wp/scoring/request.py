"""What a scoring run is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mergekit_wp.criteria import SMALL_GAP, CriterionFunction, criterion_words
from mergekit_wp.options import INTERNAL, Option
from mergekit_wp.prompts.request import Prompts
from mergekit_wp.runs.request import Overwrite, PairRequest, Restart
from mergekit_wp.terms import (
    CRITERIA,
    KINDS,
    BuiltInCriterion,
    Kind,
    LoneEstimand,
    Normalisation,
)

#: a kind is swapped exactly when that costs at most this many forward passes over the prompts
EXACT_BUDGET = 256.0


class ScoreRequest(PairRequest):
    """Everything `mergekit-wp score` is asked for about one expert.

    ``criterion``: by name, or functions of the caller's, see `criteria.CriterionFunction`. ``out``:
    None writes nothing.
    """

    command: ClassVar[str] = "score"

    prompts: Prompts
    out: Annotated[Path | None, Option(path="any")] = Field(
        default=None,
        description="Score file to write; appears only when complete. A killed run keeps its "
        "finished blocks in FILE.partial and goes on from there.",
    )
    behavior: Annotated[str | None, Option(default="the prompt file's")] = Field(
        default=None, description="Name of what the prompts elicit."
    )
    estimand: tuple[LoneEstimand, ...] = Field(
        default=("share", "gain"),
        description="share: integrated gradients from base to expert, sums to 1, what a merge "
        "wants. gain: what the component brings to the base. knockout: what the expert loses "
        "without it. activation_gain, activation_knockout: the same for what it writes in the "
        "other's run, to tell sources from what only passes a signal on.",
    )
    criterion: Annotated[
        tuple[BuiltInCriterion | CriterionFunction, ...] | None,
        Option(default="kl, and anchor too when two or more contrasts are given"),
    ] = Field(
        default=None,
        description=" ".join(f"{name}: {criterion_words(name)}." for name in CRITERIA),
    )
    normalise: Normalisation = Field(
        default="mean",
        description="mean: what a patch changes, over what base and expert differ by, both meant "
        "over prompts first. prompt: the mean of every prompt's own quotient, without prompts on "
        f"which they differ by less than {SMALL_GAP:.0%} of what they do on the mean.",
    )
    kinds: Annotated[tuple[Kind, ...], Option(also="kind")] = Field(
        default=KINDS, description="Kinds of component to score."
    )
    anchor_layer: Annotated[int | None, Option(auto=True)] = Field(
        default=None,
        ge=0,
        description="Layer the anchor is read after; auto takes the one that separates best on "
        "held-out prompts.",
    )
    verify: Annotated[int, Option(metavar="K")] = Field(
        default=32,
        ge=0,
        description="Where a kind is estimated from gradients, swap the top K and K random ones "
        "exactly, take their scores from that and write how well the estimates agree.",
    )
    share_steps: int = Field(default=5, ge=1, description="Midpoints of the share integral.")
    restart: Restart = False
    overwrite: Overwrite = False
    exact_budget: Annotated[float, INTERNAL, Field(allow_inf_nan=True)] = EXACT_BUDGET
    #: whether first-order scores by a log-probability are made second-order ones
    curvature: Annotated[bool, INTERNAL] = True
