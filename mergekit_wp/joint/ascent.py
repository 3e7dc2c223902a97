"""The steps of a fit: by Adam, judged on held-out prompts, kept after each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.engine.slopes import Term
from mergekit_wp.errors import UserError, option
from mergekit_wp.interrupts import finishing
from mergekit_wp.joint.gates import Climb, Layout, shrinking
from mergekit_wp.joint.judging import LOOK, Judge, Judgement
from mergekit_wp.joint.merged_model import VALUES, MergedModel, slopes_of
from mergekit_wp.joint.objective import Objective
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.joint.spread import SpreadModel
from mergekit_wp.joint.weighing import averaged, running, worst_first
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress


@dataclass(frozen=True)
class FitState:
    """Where a fit stands.

    Attributes:
        climb: the present gates.
        average: running mean of them over steps, which is what is judged and kept.
        seen: of the gates before each step, ``[steps so far, 2, 3, objectives]``: on the prompts of
            the step and on the judged ones, divergence from the teacher, share of its answers
            reproduced whole, and of their tokens; NaN where not looked at.
        left: running mean over steps of each objective's divergence in its own span; NaN before
            the first.
        prices: of the guards' limits, a running mean over steps.
        kept: the gates to keep.
        judge: why those.
    """

    climb: Climb
    average: torch.Tensor
    seen: torch.Tensor
    left: torch.Tensor
    prices: torch.Tensor
    kept: torch.Tensor
    judge: Judge

    @classmethod
    def fresh(cls, start: torch.Tensor, behaviors: int, guards: int) -> FitState:
        """Before anything was looked at."""
        whole = behaviors + guards
        return cls(
            Climb.at(start, guards),
            start.double(),
            torch.empty((0, 2, 3, whole), dtype=torch.float64),
            torch.full((whole,), torch.nan, dtype=torch.float64),
            torch.full((guards,), torch.nan, dtype=torch.float64),
            start.double(),
            Judge(),
        )

    @classmethod
    def from_block(cls, block: Mapping[str, torch.Tensor]) -> FitState:
        """As `to_block` left it."""
        climb = Climb(
            gates=block["gates"],
            slopes=block["slopes"],
            second=block["second"],
            steps=int(block["steps"]),
            prices=block["weighed"],
        )
        judge = Judge.from_row(block["judge"])
        return cls(
            climb=climb,
            average=block["average"],
            seen=block["seen"],
            left=block["left"],
            prices=block["prices"],
            kept=block["kept"],
            judge=judge,
        )

    def to_block(self) -> dict[str, torch.Tensor]:
        """As tensors, for the journal."""
        climb = self.climb
        return {
            "gates": climb.gates,
            "slopes": climb.slopes,
            "second": climb.second,
            "steps": torch.tensor(climb.steps),
            "weighed": climb.prices,
            "average": self.average,
            "seen": self.seen,
            "left": self.left,
            "prices": self.prices,
            "kept": self.kept,
            "judge": self.judge.to_row(),
        }

    @property
    def reached(self) -> torch.Tensor:
        """Of the gates kept: divergence and shares reproduced, judged, ``[3, objectives]``."""
        return self.seen[self.judge.step, 1]

    def onwards(self) -> FitState:
        """A new start from the gates kept."""
        guards = len(self.prices)
        return FitState.fresh(self.kept, len(self.left) - guards, guards)

    def look(self, found: Judgement, epoch: int) -> FitState:
        """Compare the present gates with the best so far."""
        step = self.climb.steps
        judge = self.judge.look(step, found, epoch)
        kept = self.average if judge.step == step else self.kept
        return replace(self, kept=kept, judge=judge)


class Fitting:
    """Steps uphill; the state is kept after each, so that a killed run goes on where it was."""

    def __init__(
        self,
        request: FitRequest,
        model: MergedModel | SpreadModel,
        behaviors: Sequence[Objective],
        guards: Sequence[Objective],
        layout: Layout,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.model = request, model
        self.objectives, self.n_behaviors = [*behaviors, *guards], len(behaviors)
        self.layout, self.journal, self.progress = layout, journal, progress
        self.fitted = layout.fitted
        self.spans = torch.tensor([o.span for o in self.objectives], dtype=torch.float64)
        self.train = [objective.among(objective.split.fitted) for objective in self.objectives]
        self.judged = [objective.among(objective.split.judged) for objective in self.objectives]
        self.epoch = max(len(train) for train in self.train)
        fitted_on = sum(len(objective.split.fitted) for objective in behaviors)
        self.shrinkage = request.shrinkage * len(behaviors) / fitted_on
        self.n_judged = min(len(objective.split.judged) for objective in behaviors)

    def run(self, start: torch.Tensor) -> FitState:
        """Take the steps, until there is nothing more to gain."""
        n, most = self.n_behaviors, self.request.steps
        state = FitState.fresh(start * self.fitted, n, len(self.objectives) - n)
        state = self.climb(state, most, "state", "fitting gates")
        steps = state.climb.steps
        taken = f"{steps} step{' is' if steps == 1 else 's are'} taken"
        why = "nothing more to gain" if state.judge.done else taken
        self.progress.note(f"{why}: the gates of step {state.judge.step} are kept")
        return state

    def allow(self, limit: float) -> None:
        """From now on, guards without a limit of their own allow so many times the perplexity."""
        own = {name for name, _ in self.request.limit_of}
        for number, objective in enumerate(self.objectives):
            if number >= self.n_behaviors and objective.name not in own:
                self.spans[number] = math.log(limit)

    def climb(self, state: FitState, most: int, key: str, what: str) -> FitState:
        """Go on from a fresh state, or from where a killed run was.

        Args:
            state: where to begin.
            most: steps; a run that was killed beyond them ends where it was.
            key: of the state in the journal.
            what: is done, for the progress.
        """
        request, n = self.request, self.n_behaviors
        block = self.journal.load(key)
        self.progress.stage(what, most, "step")
        if block is not None:
            state = FitState.from_block(block)
            self.progress.advance(state.climb.steps, resumed=True)
        while True:
            with finishing():
                step = state.climb.steps
                seen = torch.full((2, 3, len(self.objectives)), torch.nan, dtype=torch.float64)
                if step % LOOK == 0 or step >= most:
                    self.model.move_to(state.average)
                    seen[1] = self._look()
                    left = seen[1, 0] / self.spans
                    found = Judgement.of(left[:n], seen[1, 1, :n], left[n:], self.n_judged)
                    state = state.look(found, self.epoch)
                    self.progress.note(f"after {step} steps, {self.said(seen[1])}")
                done = step >= most or state.judge.done
                if not done:
                    self.model.move_to(state.climb.gates)
                    slopes, seen[0] = self._slopes(step, state.left[:n])
                state = replace(state, seen=torch.cat([state.seen, seen.unsqueeze(0)]))
                if done:
                    break
                left = running(state.left, seen[0, 0] / self.spans)
                used = torch.maximum(left, self._last_judged(state))[n:]
                slopes = slopes * self.fitted
                slopes[0] -= self.shrinkage * shrinking(self.layout, state.climb.gates)
                rate = state.judge.rate(request.rate)
                climb = state.climb.step(slopes, used, rate, request.upper)
                prices = running(state.prices, climb.prices)
                average = averaged(state.average, climb.gates, climb.steps)
                state = replace(state, climb=climb, average=average, left=left, prices=prices)
                self.journal.save(key, state.to_block())
                self.progress.advance(1)
        return state

    def _last_judged(self, state: FitState) -> torch.Tensor:
        """What was left of each objective's span at the last look, on judged prompts."""
        # those that are fitted on keep a limit before the others do
        return state.seen[state.climb.steps // LOOK * LOOK, 1, 0] / self.spans

    def said(self, seen: torch.Tensor) -> str:
        """What is reproduced, and how close to its limit every guard is."""
        n = self.n_behaviors
        names = [objective.name for objective in self.objectives]
        shares = zip(names, *seen[1:, :n].tolist(), strict=False)
        answers = [f"{name} {whole:.2f} (tokens {part:.2f})" for name, whole, part in shares]
        ratios = [
            f"; {name} at {float(kl.exp()):.3f} times the base's perplexity"
            for name, kl in zip(names[n:], seen[0, n:], strict=True)
        ]
        return f"answers reproduced: {', '.join(answers)}{''.join(ratios)}"

    def _slopes(self, step: int, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Derivatives by every gate, on one batch of each objective.

        Args:
            step: which.
            left: of each behaviour's divergence, by which they are weighed; NaN before the first.

        Returns:
            Of what the behaviours weigh together, and of minus what each guard uses of its limit,
            ``[1 + guards, gates]``; and divergence and shares reproduced by objective,
            ``[3, objectives]``.
        """
        n, terms = self.n_behaviors, []
        guards = torch.ones(len(self.objectives) - n, dtype=torch.float64)
        weights = torch.cat([worst_first(left.nan_to_num(nan=1.0)), guards])
        each = (weights / self.spans).tolist()
        every = zip(self.objectives, self.train, each, strict=True)
        for number, (objective, train, weight) in enumerate(every):
            epoch, place = divmod(step, len(train))
            seed = (self.request.seed * 1_009 + number) * 1_000_003 + epoch
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            batch = objective.batches[b := train[int(order[place])]]
            terms.append(Term(batch, objective.targets[b], weight / batch.size))
        [found] = self.model.each([terms])
        slopes = torch.zeros((1 + len(guards), self.layout.size), dtype=torch.float64)
        for number, result in enumerate(found):
            own = self.layout.collect(slopes_of(result, len(self.layout.changed)))
            if not own.isfinite().all():
                raise UserError(
                    f"after {step} steps the slopes of {self.objectives[number].name} are not "
                    f"finite; give {option('dtype', 'float32')}, or a smaller {option('rate')}"
                )
            slopes[max(0, number - n + 1)] += own
        return slopes, torch.stack([_mean(result[VALUES]) for result in found], 1)

    def _look(self) -> torch.Tensor:
        """Divergence and shares reproduced on judged prompts, ``[3, objectives]``."""
        groups = [
            [Term(objective.batches[b], objective.targets[b], 0.0) for b in judged]
            for objective, judged in zip(self.objectives, self.judged, strict=True)
        ]
        found = [
            _mean(torch.cat([result[VALUES] for result in results], 1))
            for results in self.model.each(groups)
        ]
        return torch.stack(found, 1)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Divergence, minus ``kl``, and shares reproduced, ``[3]``: of prompts' values ``[3, n]``."""
    mean = values.double().cpu().mean(1)
    return torch.cat([-mean[:1], mean[1:]])
