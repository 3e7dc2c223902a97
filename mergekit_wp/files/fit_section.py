"""What a score file says of the fit that made it: the section ``fit`` of its manifest."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mergekit_wp.files.untrusted import StrictModel
from mergekit_wp.terms import GateGranularity

#: share of its expert's answers below which a behaviour is not worth its place in a merge
ENOUGH = 0.9
#: how many times the base's perplexity a guard allows
Limit = Annotated[float, Field(gt=1)]


class Guard(StrictModel):
    """A behaviour of the base that a fit was to keep; its teacher is the base.

    ``price``: by how much the objective would rise, a small part more of its limit allowed, times
    that part; 0 where the limit cost nothing. ``limit`` is its own, None where it has the fit's;
    ``prompt_digests`` are as a manifest's.
    """

    behavior: str
    prompts_sha256: str
    prompt_digests: tuple[str, ...] | None = None
    n_prompts: PositiveInt
    price: float
    limit: Limit | None = None


#: a divergence beyond this is shown as this: its ratio would be no number
_MOST_NATS = 700.0


class Seen(StrictModel):
    """One behaviour at some gates, on some prompts.

    ``kl`` is the divergence from the teacher, in nats a token; ``answers`` the share of the
    teacher's answers that the merge reproduces whole, ``tokens`` that of their tokens (mean over
    answers): of long answers few are the same to the last token where most of each is.
    """

    kl: float
    answers: float
    tokens: float

    @property
    def ratio(self) -> float:
        """How many times the teacher's perplexity the merge has on what the teacher writes."""
        return math.exp(min(self.kl, _MOST_NATS))


class Moment(StrictModel):
    """A fit at one step, by behaviour, guards among them.

    ``fitted`` is over the prompts of that step, ``judged`` over those that the fit is judged by,
    None where they were not looked at.
    """

    step: NonNegativeInt
    fitted: dict[str, Seen] | None
    judged: dict[str, Seen] | None


class FrontPoint(StrictModel):
    """What the gates reach, where guards allow ``limit`` times the base's perplexity.

    ``reached`` is by behaviour, guards among them, on the prompts that the fit is judged by.
    """

    limit: Limit
    reached: dict[str, Seen]


class Fit(StrictModel):
    """How `mergekit-wp fit` made the ``path`` scores: the same in the files of all experts.

    ``granularity`` is what each gate covers; ``limit`` the ratio of perplexities that every guard
    allows that has none of its own, None without guards; ``upper`` the largest gate it allowed;
    ``held_out`` the number of each behaviour's prompts that were only judged by, 0 where it is
    judged by those it was fitted on; ``done`` whether there was nothing more to gain when it ended;
    ``best_step`` the number of steps after which the gates were what they are; ``front`` what was
    reached under further limits, by gates that are not kept.
    """

    granularity: GateGranularity
    guards: tuple[Guard, ...]
    limit: Limit | None
    start: str
    rate: float
    shrinkage: float
    upper: PositiveFloat
    prompts_a_step: PositiveInt
    held_out: dict[str, NonNegativeInt]
    done: bool
    best_step: NonNegativeInt
    history: tuple[Moment, ...]
    front: tuple[FrontPoint, ...] = ()

    @model_validator(mode="after")
    def _counts_up(self) -> Self:
        if [moment.step for moment in self.history] != list(range(len(self.history))):
            raise ValueError("history: its steps do not count up from 0")
        if self.best_step >= len(self.history):
            raise ValueError(f"history has no step {self.best_step}, whose scores these are")
        if not self.reached:
            raise ValueError(f"history: nothing was judged at step {self.best_step}")
        if (self.limit is None) == bool(self.guards):
            raise ValueError("'guards' and a 'limit' belong together")
        if self.front and self.limit is None:
            raise ValueError("a 'front' needs 'guards'")
        limits = [point.limit for point in self.curve]
        if limits != sorted(set(limits)):
            raise ValueError("front: its limits do not rise from the fit's own")
        return self

    @property
    def reached(self) -> dict[str, Seen]:
        """What the scores do, by behaviour, guards among them."""
        return self.history[self.best_step].judged or {}

    @property
    def curve(self) -> tuple[FrontPoint, ...]:
        """What is reached under every limit, the scores' own first; nothing without guards."""
        if self.limit is None:
            return ()
        return (FrontPoint(limit=self.limit, reached=self.reached), *self.front)

    def allowed(self, guard: str, point: FrontPoint | None = None) -> float:
        """A guard's limit, of the scores' own gates or at a point of the curve."""
        assert self.limit is not None  # there are guards
        own = next(g.limit for g in self.guards if g.behavior == guard)
        return own or (self.limit if point is None else point.limit)

    def held(self, guard: str, point: FrontPoint | None = None) -> bool:
        """Whether a guard's limit was kept there, a tenth of what it allows aside."""
        reached = (point.reached if point else self.reached)[guard]
        return reached.kl <= 1.1 * math.log(self.allowed(guard, point))

    def verdict(self, guard: str) -> str:
        """Of a guard's limit, in words: "out of reach" is only known of a fit that was done."""
        if self.held(guard):
            return "held"
        return "out of reach" if self.done else "not held yet"

    def judged_on(self, *behaviors: str) -> str:
        """On which prompts it was looked what these reproduce, in words."""
        aside = [name for name in behaviors if self.held_out[name]]
        if not aside:
            return "the prompts it was fitted on"
        rest = len(aside) < len(behaviors)
        others = f" of {', '.join(aside)}, of the others those it was fitted on" if rest else ""
        return f"held-out prompts{others}"
