"""What fitted gates are taught: every expert's behaviour, and guards, whose teacher is the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.errors import UserError
from mergekit_wp.joint.members import Member
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import PromptBatch, batches
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.references import References, logprobs, values_of
from mergekit_wp.runs.run import Run


@dataclass(frozen=True)
class Objective:
    """One behaviour in batches, with how its values become a recovery.

    Attributes:
        name: of the behaviour.
        batches: all of its prompts.
        targets: the teacher's distributions, one per batch.
        zero: value that counts as 0, by prompt, ``[prompts]``.
        distance: from there to the teacher, ``[prompts]``.
    """

    name: str
    batches: list[PromptBatch]
    targets: list[Targets]
    zero: torch.Tensor
    distance: torch.Tensor

    @property
    def span(self) -> float:
        """Mean distance over all prompts."""
        return float(self.distance.mean())

    def recovery(self, values: Mapping[int, torch.Tensor]) -> float:
        """0 at the base (of a guard: as far away as the experts are), 1 at the teacher.

        Args:
            values: of ``kl``, ``[prompts of the batch]`` by number of the batch.
        """
        change = distance = 0.0
        for b, of_batch in values.items():
            members = self.batches[b].members
            change += float((of_batch.double().cpu() - self.zero[members]).sum())
            distance += float(self.distance[members].sum())
        return change / distance


def objective_of(member: Member, references: References) -> Objective:
    """What an expert does on its own prompts; 0 is the base.

    Args:
        member: the expert.
        references: it and the base on the prompts.
    """
    reference = references.values["kl"]
    return Objective(
        str(member.request.behavior),
        references.batches,
        references.targets,
        reference.base.double().cpu(),
        reference.distance.double().cpu(),
    )


@torch.no_grad()
def guard_of(run: Run, members: Sequence[Member], journal: Journal, size: int) -> Objective:
    """What the base does on some prompts; 0 is as far from it as the experts are on average.

    Args:
        run: the models on the guard's prompts.
        members: the experts.
        journal: keeps the base's answers.
        size: prompts per batch.

    Raises:
        UserError: the experts answer like the base there.
    """
    resident, progress, prompts = run.load(), run.progress, run.prompts
    samples = run.samples(resident, journal, prefix=f"guard-{prompts.name}.", position=0.0)
    every = list(batches(samples, size, resident.device, resident.side))
    progress.stage(f"base and experts on guard {prompts.name}", len(members) + 1, "model")
    resident.move_to(0.0)
    decoder = Decoder(resident.model)
    at_once = AtOnce(size, progress.note)
    targets = at_once.run(lambda few: [Targets(logprobs(decoder, batch, few)) for batch in every])
    progress.advance(1)
    total = torch.zeros(len(samples), dtype=torch.float64)
    for other in members:
        resident.fill(other.pair.expert.read)
        values = at_once.run(
            lambda few: values_of(decoder, every, targets, ("kl",), len(samples), few)
        )
        total += values["kl"].double()
        progress.advance(1)
    zero = total / len(members)
    if float(zero.mean()) > -1e-9:
        raise UserError(
            f"guard {prompts.source}: the experts answer like the base there, so there is nothing "
            "to guard"
        )
    return Objective(prompts.name, every, targets, zero, -zero)
