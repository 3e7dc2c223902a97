"""The terms of a step as jobs of a cluster, whose workers hold the merge at the same gates.

Gates are sent, never weights. A term does not depend on which others go with it, and terms are
added in their order: so files are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_wp.criteria import Targets
from mergekit_wp.engine.slopes import Term
from mergekit_wp.joint.cache import keep_weights
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.members import Member
from mergekit_wp.joint.merged_model import MergedModel
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.runs.cluster import Assignment, Cluster, SentModels, cluster, moved
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result


@dataclass(frozen=True)
class StepPart:
    """Some terms of a step.

    Attributes:
        key: what notes call it.
        members: the numbers of the terms.
        weights: of each.
    """

    key: str
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Merges(Assignment):
    """The merge of some experts at any gates; see `MergedModel`."""

    models: SentModels
    layout: Layout
    size: int
    together: int
    cache: int | None

    def begin(self, told: Callable[[str], None]) -> Callable[..., Result]:
        """Open the models."""
        pairs, at_once = self.models.opened(), AtOnce(self.size, told)
        resident = self.models.loaded(pairs[0])
        if self.cache is not None:
            keep_weights(pairs, self.cache, resident.device, told)
        model = MergedModel(resident, pairs, self.layout, at_once, self.together)
        present: torch.Tensor | None = None

        def compute(
            job: StepPart, flat: torch.Tensor, *sent: tuple[PromptBatch, Targets]
        ) -> Result:
            nonlocal present
            if present is None or not torch.equal(present, flat):
                present = None
                model.move_to(flat)
                present = flat
            terms = [
                Term(*moved(term, resident.device), weight)
                for term, weight in zip(sent, job.weights, strict=True)
            ]
            [found] = model.each([terms])
            return {
                f"{number} {name}": value
                for number, result in zip(job.members, found, strict=True)
                for name, value in result.items()
            }

        return compute


class SpreadModel:
    """The merge at the gates it was last moved to, as the workers of a cluster hold it."""

    def __init__(self, workers: Cluster) -> None:
        self.workers = workers
        self._gates: Any = None
        self._sent: dict[int, tuple[PromptBatch, Any]] = {}

    def move_to(self, flat: torch.Tensor) -> None:
        """Let workers build the merge with some gates, each before its next terms."""
        self._gates = self.workers.share(flat)

    def each(self, groups: Sequence[Sequence[Term]]) -> Iterator[list[Result]]:
        """Terms at the present gates; see `MergedModel.each`. All groups are computed at once."""
        found = iter(self._computed([term for terms in groups for term in terms]))
        for terms in groups:
            yield [next(found) for _ in terms]

    def _computed(self, terms: Sequence[Term]) -> list[Result]:
        found: list[Result] = [{} for _ in terms]

        def keep(_: StepPart, result: Result) -> None:
            for entry, value in result.items():
                number, name = entry.split(" ", 1)
                found[int(number)][name] = value

        def shared(job: StepPart) -> list[Any]:
            return [self._gates, *(self._term(terms[i]) for i in job.members)]

        self.workers.run(self._parts(terms), keep, shared, whole=True)
        return found

    def _parts(self, terms: Sequence[Term]) -> list[StepPart]:
        """One part for each worker: the longest terms first, each to the one that has least."""
        tokens = [term.batch.ids.numel() for term in terms]
        parts: list[list[int]] = [[] for _ in range(min(self.workers.count, len(terms)))]
        for i in sorted(range(len(terms)), key=lambda i: (-tokens[i], i)):
            min(parts, key=lambda part: sum(tokens[j] for j in part)).append(i)
        return [
            StepPart(
                f"{number + 1} of {len(parts)} of a step",
                tuple(sorted(part)),
                tuple(terms[i].weight for i in sorted(part)),
            )
            for number, part in enumerate(parts)
        ]

    def _term(self, term: Term) -> Any:
        """Prompts and targets, sent when they are first asked for."""
        key = id(term.batch)  # which is kept here, so that no other takes its number
        if key not in self._sent:
            sent = self.workers.share(moved((term.batch, term.targets), "cpu"))
            self._sent[key] = term.batch, sent
        return self._sent[key][1]


@contextmanager
def merged_model(
    request: FitRequest,
    members: Sequence[Member],
    layout: Layout,
    size: int,
    together: int,
    progress: Progress,
) -> Iterator[MergedModel | SpreadModel]:
    """The merge of a recipe's experts, here or on a cluster, as the request wants it.

    Args:
        request: how models are run.
        members: the experts.
        layout: how the gates lie.
        size: prompts of a term that go through together.
        together: terms that go through layer by layer together.
        progress: told of steps back.

    Raises:
        UserError: there is no such cluster, or a cache that cannot be.
    """
    pairs = [member.pair for member in members]
    cache = request.cache_size
    if request.ray:
        models = SentModels.of(request, *pairs)
        with cluster(Merges(models, layout, size, together, cache), progress) as workers:
            yield SpreadModel(workers)
        return
    if cache is not None:
        keep_weights(pairs, cache, request.device, progress.note)
    at_once = AtOnce(size, progress.note)
    yield MergedModel(members[0].run.load(), pairs, layout, at_once, together)
