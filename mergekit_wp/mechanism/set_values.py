"""What is measured of base and expert, and of each with a set of components from the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mergekit_wp.criteria import Criteria, Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.mechanism.sets import Members, extreme, matched, swapped
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import UNBOUNDED, AtOnce
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.runs.cluster import Assignment, SentModels, moved
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.references import anchor_of, logprobs, values_of
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.terms import CRITERIA, Direction, Kind, SetName

#: what behaviour is called among the measures
BEHAVIOR: Literal["behavior"] = "behavior"


@dataclass(frozen=True)
class Whole:
    """One of the two checkpoints as it is."""

    side: Literal["base", "expert"]

    @property
    def key(self) -> str:
        """Name of its block in the journal."""
        return self.side


@dataclass(frozen=True)
class Swap:
    """One of them with a set of some size from the other."""

    direction: Direction
    set: SetName
    size: int
    draw: int

    @property
    def key(self) -> str:
        """Name of its block in the journal."""
        return f"{self.direction}.{self.set}.{self.size}.{self.draw}"

    def members(self, fine: Mapping[Kind, torch.Tensor], seed: int) -> Members:
        """The set."""
        top = extreme(fine, self.size, largest=self.set != "bottom")
        if self.set != "random":
            return top
        own_seed = (seed * 1_000_003 + self.size) * 1_009 + self.draw
        return matched(top, torch.Generator().manual_seed(own_seed))


def swaps(sizes: Sequence[int], draws: int) -> Iterator[Swap]:
    """All sets of some sizes."""
    directions: tuple[Direction, ...] = ("restoration", "knockout")
    for direction in directions:
        for size in sizes:
            yield Swap(direction, "top", size, 0)
            yield Swap(direction, "bottom", size, 0)
            yield from (Swap(direction, "random", size, draw) for draw in range(draws))


@dataclass(frozen=True)
class SetInputs:
    """What sets are made of and measured on.

    Attributes:
        fine: scores by kind of the fine partition, which sets are chosen by.
        seed: of random sets.
        batches: the prompts.
        targets: one per batch.
        criteria: to read.
        task: items whose answers are checked, if there are any.
        asked: how the models are asked.
        at_once: sequences per forward pass.
    """

    fine: Mapping[Kind, torch.Tensor]
    seed: int
    batches: Sequence[PromptBatch]
    targets: Sequence[Targets]
    criteria: Criteria
    task: JsonlTask | None
    asked: TextInterface
    at_once: int

    def on(self, device: str) -> SetInputs:
        """With prompts and targets on a device."""
        batches, targets = moved((self.batches, self.targets), device)
        return replace(self, batches=batches, targets=targets)


def set_criteria(file: ScoreFile) -> Criteria:
    """``kl``, and the criteria of a score file; a caller's function is not in its file."""
    return tuple(dict.fromkeys(("kl", *(c for c in file.manifest.criteria if c in CRITERIA))))


def set_targets(
    resident: ResidentModel, every: Sequence[PromptBatch], file: ScoreFile, at_once: AtOnce
) -> list[Targets]:
    """What sets are measured against: the expert, and the file's anchor."""
    resident.move_to(1.0)
    anchor, decoder = anchor_of(file, resident), Decoder(resident.model)
    return at_once.run(
        lambda size: [Targets(logprobs(decoder, batch, size), anchor) for batch in every]
    )


class SetMeasurement:
    """Measures sets in the resident model: every criterion by prompt, and answers by item."""

    def __init__(
        self, resident: ResidentModel, given: SetInputs, told: Callable[[str], None]
    ) -> None:
        self.resident, self.given = resident, given
        self.at_once = AtOnce(given.at_once, told)
        # answers take other memory than one pass does
        self.answered_at_once = AtOnce(UNBOUNDED, told)

    def __call__(self, which: Whole | Swap) -> Result:
        """Values ``[prompts]`` by criterion, and ``[items]`` of the behaviour."""
        weight_of = self._weights(which)
        self.resident.fill(lambda name, out: out.copy_(weight_of(name)))
        return self._measured()

    def _weights(self, which: Whole | Swap) -> Callable[[str], torch.Tensor]:
        resident, pair = self.resident, self.resident.pair

        def of(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
            return lambda name: checkpoint.tensor(name, resident.dtype, resident.device)

        if isinstance(which, Whole):
            return of(pair.base if which.side == "base" else pair.expert)
        inside, outside = of(pair.expert), of(pair.base)
        if which.direction == "knockout":
            inside, outside = outside, inside
        members = which.members(self.given.fine, self.given.seed)
        return swapped(pair.partition, members, inside, outside)

    @torch.no_grad()
    def _measured(self) -> Result:
        given, decoder = self.given, Decoder(self.resident.model)
        n = sum(batch.size for batch in given.batches)
        values = self.at_once.run(
            lambda size: values_of(decoder, given.batches, given.targets, given.criteria, n, size)
        )
        found: dict[str, Any] = {name: value.double() for name, value in values.items()}
        if given.task is not None:
            scores = given.task.evaluate(
                self.resident.model, given.asked, "test", self.answered_at_once
            )
            found[BEHAVIOR] = torch.tensor([x.score for x in scores], dtype=torch.float64)
        return found


@dataclass(frozen=True)
class Sets(Assignment):
    """The sets of one score file."""

    models: SentModels
    given: SetInputs

    def begin(self, told: Callable[[str], None]) -> Callable[[Whole | Swap], Result]:
        """Open the models."""
        [pair] = self.models.opened()
        resident = self.models.loaded(pair)
        return SetMeasurement(resident, self.given.on(resident.device), told)
