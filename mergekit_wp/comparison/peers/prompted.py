"""The experts on their own prompts: the data that peers learn from, the same that a fit has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mergekit_wp.criteria import Targets, split, wide
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import record
from mergekit_wp.joint.members import Member
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch, Sample, batches
from mergekit_wp.runs.journal import Unwritten

#: of a mean over prompts, from one part of their batch
Loss = Callable[[Decoder, PromptBatch], torch.Tensor]


@dataclass
class PromptedExperts:
    """The experts' prompts with their answers, and one model in memory that learns from them.

    Attributes:
        members: the experts.
        told: of every step back where memory runs out.
    """

    members: Sequence[Member]
    told: Callable[[str], None]

    @cached_property
    def samples(self) -> list[list[Sample]]:
        """Prompts with answers of every expert: the prompt file's, else its own."""
        found = []
        for member in self.members:
            with Unwritten() as journal:
                found.append(member.run.samples(member.run.load(), journal))
        return found

    @cached_property
    def model(self) -> ResidentModel:
        """The model whose weights are overwritten."""
        return self.members[0].run.load()

    @cached_property
    def at_once(self) -> AtOnce:
        """How many sequences go through it together with gradients."""
        return AtOnce(8, self.told)

    @property
    def count(self) -> int:
        """Prompts of all experts."""
        return sum(len(samples) for samples in self.samples)

    def become(self, expert: int) -> None:
        """Set the model to one of the experts."""
        self.model.fill(self.members[expert].pair.expert.read)

    def batches(self, expert: int, size: int) -> list[PromptBatch]:
        """An expert's prompts."""
        return list(batches(self.samples[expert], size, self.model.device, self.model.side))

    def steps(self, count: int, size: int, seed: int = 0) -> Iterator[list[PromptBatch]]:
        """For every step a batch of each expert, in another order in every epoch.

        Args:
            count: of steps.
            size: prompts of each expert in one step.
            seed: of the orders.
        """
        every = [self.batches(expert, size) for expert in range(len(self.members))]
        generators = [torch.Generator().manual_seed(seed + e) for e in range(len(every))]
        waiting: list[list[int]] = [[] for _ in every]
        for _ in range(count):
            chosen = []
            for own, generator, order in zip(every, generators, waiting, strict=True):
                if not order:
                    order += torch.randperm(len(own), generator=generator).tolist()
                chosen.append(own[order.pop()])
            yield chosen

    def descend(
        self,
        chosen: Sequence[PromptBatch],
        losses: Sequence[Loss],
        begin: Callable[[], object] | None = None,
    ) -> None:
        """Add up gradients of the sum of losses, one batch each, in parts that fit into memory.

        Args:
            chosen: a batch of each expert.
            losses: a mean over the prompts of a batch, one for each.
            begin: called before the first part, and again where memory runs out.
        """
        decoder = Decoder(self.model.model)

        def in_parts(size: int) -> None:
            self.model.model.zero_grad()
            if begin is not None:
                begin()
            for batch, loss in zip(chosen, losses, strict=True):
                for part, _ in split(batch, Targets(), size):
                    (loss(decoder, part) * (part.size / batch.size)).backward()

        with torch.enable_grad():
            self.at_once.run(in_parts)


@dataclass(frozen=True)
class AnswerStates:
    """What a model computes at the positions that predict the answers, in float32 or finer.

    Attributes:
        logits: ``[P, vocabulary]``.
        hidden: after every layer, ``[P, layers, hidden]``.
    """

    logits: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of(cls, decoder: Decoder, batch: PromptBatch) -> AnswerStates:
        """One forward pass."""
        calls = record(decoder, batch).calls
        states = [call.output[batch.rows, batch.cols] for call in calls]
        return cls(wide(decoder.logits(states[-1])), wide(torch.stack(states, 1)))


def answer_logits(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    """Logits that predict the answers, ``[P, vocabulary]``, in float32 or finer."""
    last = record(decoder, batch).calls[-1].output
    return wide(decoder.logits(last[batch.rows, batch.cols]))
