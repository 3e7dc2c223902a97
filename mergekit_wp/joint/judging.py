"""When a fit is done, and which gates it keeps: by the answers that users get.

The divergence saturates: divided by the base's own, which is huge where the base lacks a skill, it
is nearly 0 long before the answers are right. So gates are judged by the share of their teachers'
answers that the merge gives whole; where that says nothing, by the logarithm of what is left of the
divergence. Pure maths: no models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

#: fewer prompts of a behaviour than this are all fitted on; the most prompts that are judged by
FEW, MOST = 64, 128
#: gates are judged every so many steps
LOOK = 10
#: how much less the mean logarithm of what is left must be to count as a gain
LEAST_GAIN = 0.05
#: steps without a gain before the rate falls: an epoch, but within these
PATIENCE = (20, 30)
#: the rate falls so many times, by this factor, before the fit ends
FALLS, FACTOR = 2, 3.0
#: what keeps the logarithm finite; a limit that is used up by a tenth more counts as held
_SMALLEST, _SLACK = 1e-4, 1.1


@dataclass(frozen=True)
class PromptSplit:
    """Which prompts of a behaviour or guard are fitted on, and which judged by.

    Attributes:
        fitted: their places in the file.
        judged: the same; drawn at random, and held out, or, where nothing is, among `fitted`.
    """

    fitted: frozenset[int]
    judged: frozenset[int]

    @classmethod
    def of(cls, prompts: int, part: float, seed: int) -> PromptSplit:
        """Of so many prompts, of which a part is held out where they are not few.

        Args:
            prompts: how many there are.
            part: of them, in [0, 1); 0 holds out nothing.
            seed: of the draw; the same of every behaviour, for files may be parallel.
        """
        part = part if prompts >= FEW else 0.0
        held_out = max(1, round(part * prompts)) if part else prompts
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed)).tolist()
        judged = frozenset(order[: min(held_out, MOST, prompts - 1 if part else prompts)])
        every = frozenset(order)
        return cls(every - judged if part else every, judged)

    @property
    def held_out(self) -> int:
        """How many prompts are only judged by."""
        return len(self.judged - self.fitted)


@dataclass(frozen=True)
class Judgement:
    """What some gates are worth.

    Attributes:
        over: logarithm of how far the guard that is furthest beyond its limit is; 0 where all hold.
        answers: mean of the worst and the mean behaviour's share of answers reproduced.
        left: mean logarithm of what is left of the behaviours' divergences.
        blur: differences of answers up to this say nothing: half a standard error, for two looks
            are at the same prompts.
    """

    over: float
    answers: float
    left: float
    blur: float = 0.0

    @classmethod
    def of(
        cls, left: torch.Tensor, answers: torch.Tensor, used: torch.Tensor, prompts: int
    ) -> Judgement:
        """Of what was seen.

        Args:
            left: of each behaviour's divergence, ``[behaviours]``.
            answers: share that each reproduces, ``[behaviours]``.
            used: of the guards' limits, ``[guards]``.
            prompts: of one behaviour that are judged by.
        """
        over = max(0.0, float((used / _SLACK).max().log())) if len(used) else 0.0
        both = (float(answers.min()) + float(answers.mean())) / 2
        blur = 0.5 * (both * (1 - both) / prompts) ** 0.5
        return cls(over, both, float(left.clamp_min(_SMALLEST).log().mean()), blur)

    def beats(self, other: Judgement) -> bool:
        """Whether these gates are the ones to keep."""
        if self.over != other.over:
            return self.over < other.over
        if abs(self.answers - other.answers) > self.blur:
            return self.answers > other.answers
        return self.left < other.left

    def gains_on(self, best: Judgement) -> bool:
        """Whether anything is better than the best of everything so far."""
        return (
            self.answers > best.answers + self.blur
            or self.left < best.left - LEAST_GAIN
            or self.over < best.over - LEAST_GAIN
        )

    def and_best(self, best: Judgement) -> Judgement:
        """The best of everything so far."""
        return Judgement(
            min(self.over, best.over), max(self.answers, best.answers), min(self.left, best.left)
        )


_NOTHING = Judgement(float("inf"), -1.0, float("inf"))


@dataclass(frozen=True)
class Judge:
    """What was found so far.

    Attributes:
        kept: of the gates that are kept.
        step: after which they were reached.
        best: of everything so far, not of one set of gates.
        gained: the step of the last gain, or fall of the rate.
        falls: how often the rate has fallen.
    """

    kept: Judgement = _NOTHING
    step: int = 0
    best: Judgement = _NOTHING
    gained: int = 0
    falls: int = 0

    def look(self, step: int, found: Judgement, epoch: int) -> Judge:
        """After one more look.

        Args:
            step: at which.
            found: what the present gates are worth.
            epoch: steps in which every prompt is fitted on once.
        """
        here = replace(self, kept=found, step=step) if found.beats(self.kept) else self
        if found.gains_on(self.best):
            return replace(here, best=found.and_best(self.best), gained=step)
        least, most = PATIENCE
        if step - self.gained < min(max(epoch, least), most):
            return here
        return replace(here, gained=step, falls=self.falls + 1)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to gain."""
        return self.falls > FALLS

    def rate(self, first: float) -> float:
        """Of the next step."""
        return float(first / FACTOR**self.falls)

    def to_row(self) -> torch.Tensor:
        """As numbers, for the journal."""
        kept, best = self.kept, self.best
        return torch.tensor(
            [
                *(kept.over, kept.answers, kept.left, self.step),
                *(best.over, best.answers, best.left, self.gained, self.falls),
            ],
            dtype=torch.float64,
        )

    @classmethod
    def from_row(cls, row: torch.Tensor) -> Judge:
        """As `to_row` left it."""
        over, answers, left, step, *rest = row.tolist()
        best = Judgement(*rest[:3])
        return cls(Judgement(over, answers, left), int(step), best, int(rest[3]), int(rest[4]))
