"""The steps of a fit: uphill by Adam, looked at on held-out prompts, kept after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import mul

import torch

from mergekit_wp.criteria import split
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.errors import UserError, option
from mergekit_wp.interrupts import finishing
from mergekit_wp.joint.gates import Climb, Layout, penalty_slope, weights
from mergekit_wp.joint.members import Member
from mergekit_wp.joint.merged_model import mix
from mergekit_wp.joint.objective import Objective
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress

#: held-out prompts are looked at every so many steps; the fit ends after so many looks in vain
LOOK, PATIENCE, LEAST_GAIN = 5, 6, 1e-3


@dataclass(frozen=True)
class FitState:
    """Where a fit stands.

    Attributes:
        climb: the present gates.
        seen: recoveries ``[steps so far, 2, objectives]`` of the gates before each step, on the
            prompts fitted on and on held-out ones; NaN where not looked at.
        best: the gates with the best held-out recovery.
        best_step: steps after which they were reached.
        best_value: their objective on held-out prompts.
        vain: looks since then.
    """

    climb: Climb
    seen: torch.Tensor
    best: torch.Tensor
    best_step: int
    best_value: float
    vain: int

    @classmethod
    def fresh(cls, start: torch.Tensor, objectives: int) -> FitState:
        """Before anything was looked at."""
        empty = torch.empty((0, 2, objectives), dtype=torch.float64)
        return cls(Climb.at(start), empty, start.double(), 0, float("-inf"), 0)

    @classmethod
    def from_block(cls, block: Mapping[str, torch.Tensor]) -> FitState:
        """As `to_block` left it."""
        steps, best_step, best_value, vain = block["numbers"].tolist()
        climb = Climb(block["gates"], block["first"], block["second"], int(steps))
        return cls(climb, block["seen"], block["best"], int(best_step), best_value, int(vain))

    def to_block(self) -> dict[str, torch.Tensor]:
        """As tensors, for the journal."""
        climb = self.climb
        numbers = [climb.steps, self.best_step, self.best_value, self.vain]
        return {
            "gates": climb.gates,
            "first": climb.first,
            "second": climb.second,
            "seen": self.seen,
            "best": self.best,
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }

    def look(self, value: float) -> FitState:
        """Compare the present gates' objective on held-out prompts with the best so far."""
        if value > self.best_value + LEAST_GAIN:
            here = self.climb
            return replace(self, best=here.gates, best_step=here.steps, best_value=value, vain=0)
        return replace(self, vain=self.vain + 1)


class Fitting:
    """Steps uphill; the state is kept after each, so that a killed run goes on where it was."""

    def __init__(
        self,
        request: FitRequest,
        members: Sequence[Member],
        objectives: Sequence[Objective],
        layout: Layout,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.members, self.objectives = request, members, objectives
        self.layout, self.journal, self.progress = layout, journal, progress
        self.resident = members[0].run.load()
        wide, device = torch.promote_types(self.resident.dtype, torch.float32), request.device
        self.vectors = [TaskVector.of(member.pair, wide, device) for member in members]
        self.fitted = layout.fitted
        self.at_once = AtOnce(request.prompts_a_step, progress.note)
        guards = len(request.guards)
        self.weights = weights(len(objectives) - guards, guards, request.guard_weight)
        sides = [self._split(objective) for objective in objectives]
        self.train = [train for train, _ in sides]
        self.held_out = [held_out for _, held_out in sides]

    def _split(self, objective: Objective) -> tuple[list[int], list[int]]:
        """Batches to fit on, and batches only to look at."""
        n = len(objective.batches)
        if self.request.held_out == 0:
            return list(range(n)), []
        if n < 2:
            raise UserError(
                f"'{objective.name}' has prompts for one step only, so none can be held out; give "
                f"more prompts, a smaller {option('prompts_a_step')}, or {option('held_out', 0)} "
                "to fit without"
            )
        generator = torch.Generator().manual_seed(self.request.seed)
        order = torch.randperm(n, generator=generator).tolist()
        aside = min(n - 1, max(1, round(self.request.held_out * n)))
        return sorted(order[aside:]), sorted(order[:aside])

    def run(self, start: torch.Tensor) -> FitState:
        """Take the steps; stops early where held-out prompts gain nothing more."""
        request, looking = self.request, self.request.held_out > 0
        block = self.journal.load("state")
        state = FitState.fresh(start * self.fitted, len(self.objectives))
        self.progress.stage("fitting gates", request.steps, "step")
        if block is not None:
            state = FitState.from_block(block)
            self.progress.advance(state.climb.steps, resumed=True)
        while True:
            with finishing():
                step = state.climb.steps
                held_out = [float("nan")] * len(self.objectives)
                self.move_to(state.climb.gates)
                if looking and (step % LOOK == 0 or step == request.steps):
                    held_out = self._look()
                    state = state.look(sum(map(mul, self.weights, held_out)))
                    told = zip(self.objectives, held_out, strict=True)
                    self.progress.note(
                        f"after {step} steps, held-out prompts recover "
                        + ", ".join(f"{objective.name} {value:.2f}" for objective, value in told)
                    )
                done = step == request.steps or state.vain >= PATIENCE
                slope, fitted = self._slope(step)
                row = torch.tensor([[fitted, held_out]], dtype=torch.float64)
                state = replace(state, seen=torch.cat([state.seen, row]))
                if done:
                    break
                slope = (slope - request.penalty * penalty_slope(state.climb.gates)) * self.fitted
                rate = request.rate * (1 - step / request.steps)
                climb = state.climb.step(slope, rate, request.upper)
                state = replace(state, climb=climb)
                self.journal.save("state", state.to_block())
                self.progress.advance(1)
        if not looking:
            state = replace(state, best=state.climb.gates, best_step=state.climb.steps)
        elif state.vain >= PATIENCE:
            self.progress.note(
                f"nothing more to gain: the gates of step {state.best_step} are kept"
            )
        return state

    def _slope(self, step: int) -> tuple[torch.Tensor, list[float]]:
        """Derivative of the objective by every gate, and the recoveries, on one batch each."""
        terms, chosen = [], []
        decoder = Decoder(self.resident.model)
        every = zip(self.objectives, self.train, self.weights, strict=True)
        for number, (objective, train, share) in enumerate(every):
            epoch, place = divmod(step, len(train))
            seed = (self.request.seed * 1_009 + number) * 1_000_003 + epoch
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            chosen.append(b := train[int(order[place])])
            batch = objective.batches[b]
            weight = share / (batch.size * objective.span)
            terms.append(Term(batch, objective.targets[b], weight))

        def in_parts(size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
            """Slopes are sums over prompts: so many of every term go through at once."""
            pieces = [split(term.batch, term.targets, size) for term in terms]
            values: list[list[torch.Tensor]] = [[] for _ in terms]
            total = torch.zeros(self.layout.size, dtype=torch.float64)
            for turn in range(max(len(piece) for piece in pieces)):
                here = [i for i, piece in enumerate(pieces) if turn < len(piece)]
                some = [Term(*pieces[i][turn], terms[i].weight) for i in here]
                own, found = slopes(decoder, some, self.layout.layouts, self.vectors)
                total += self.layout.collect(found)
                for i, value in zip(here, own, strict=True):
                    values[i].append(value)
            return [torch.cat(own) for own in values], total

        values, slope = self.at_once.run(in_parts)
        recoveries = [
            objective.recovery({b: value})
            for objective, b, value in zip(self.objectives, chosen, values, strict=True)
        ]
        return slope, recoveries

    def _look(self) -> list[float]:
        """Recovery of every behaviour on its held-out prompts."""
        pairs = zip(self.objectives, self.held_out, strict=True)
        return [self._recovery(objective, held_out) for objective, held_out in pairs]

    @torch.no_grad()
    def _recovery(self, objective: Objective, chosen: Sequence[int]) -> float:
        """Of some batches, at the present weights."""
        decoder = Decoder(self.resident.model)

        def values(b: int, size: int) -> torch.Tensor:
            parts = split(objective.batches[b], objective.targets[b], size)
            # one run is held at a time
            own = [Receiver(decoder, record(decoder, x), ("kl",), y).own["kl"] for x, y in parts]
            return torch.cat(own)

        return objective.recovery({b: self.at_once.run(partial(values, b)) for b in chosen})

    def move_to(self, flat: torch.Tensor) -> None:
        """The merge as the method would write it with the present gates."""
        gates = self.layout.unflat(flat)
        mix(
            self.resident,
            self.members,
            self.layout.layouts,
            lambda e, name: self.layout.of_tensor(gates[e], name),
        )
