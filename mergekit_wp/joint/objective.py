"""What fitted gates are taught: every expert's behaviour, and guards, whose teacher is the base."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from mergekit_wp.criteria import Targets, kl_values, reproduced
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.joint.judging import PromptSplit
from mergekit_wp.joint.members import Member
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import PromptBatch, batches
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.references import References, logprobs, response_logits
from mergekit_wp.runs.run import Run


@dataclass(frozen=True)
class Objective:
    """One behaviour or guard in batches.

    Attributes:
        name: of the behaviour.
        batches: all of its prompts.
        targets: the teacher's distributions, one per batch.
        span: divergence from the teacher that counts as 1: of a behaviour the base's on the prompts
            that are judged by, of a guard its limit.
        split: which prompts are fitted on, and which judged by. No batch has both, or all are.
    """

    name: str
    batches: list[PromptBatch]
    targets: list[Targets]
    span: float
    split: PromptSplit

    def among(self, prompts: Collection[int]) -> list[int]:
        """Batches of nothing but these prompts."""
        return [
            place
            for place, batch in enumerate(self.batches)
            if all(member in prompts for member in batch.members.tolist())
        ]


def objective_of(member: Member, references: References, split: PromptSplit) -> Objective:
    """What an expert does on its own prompts.

    Args:
        member: the expert.
        references: it and the base on the prompts, those that are judged by apart.
        split: of the prompts.
    """
    distance = references.values["kl"].distance.double()
    span = float(distance[sorted(split.judged)].mean())
    name = str(member.request.behavior)
    return Objective(name, references.batches, references.targets, span, split)


@torch.no_grad()
def guard_of(run: Run, journal: Journal, size: int, limit: float, split: PromptSplit) -> Objective:
    """What the base does on some prompts.

    Args:
        run: the models on the guard's prompts.
        journal: keeps the base's answers.
        size: prompts per batch.
        limit: the most divergence from the base, mean over prompts of the mean over positions.
        split: of the prompts.
    """
    resident, progress, prompts = run.load(), run.progress, run.prompts
    samples = run.samples(resident, journal, prefix=f"guard-{prompts.name}.", position=0.0)
    every = list(batches(samples, size, resident.device, resident.side, split.judged))
    progress.stage(f"base on guard {prompts.name}", len(samples), "prompt")
    resident.move_to(0.0)
    decoder = Decoder(resident.model)
    at_once = AtOnce(size, progress.note)
    targets = at_once.run(lambda few: [Targets(logprobs(decoder, batch, few)) for batch in every])
    progress.advance(len(samples))
    resident.release()
    return Objective(prompts.name, every, targets, limit, split)


def closeness(decoder: Decoder, batch: PromptBatch, targets: Targets) -> torch.Tensor:
    """Values of ``kl``, and how much of each response is `reproduced`, ``[3, n]`` on the CPU.

    Args:
        decoder: at some weights.
        batch: the prompts.
        targets: the teacher's distributions.
    """
    logits = response_logits(decoder, batch)
    values = kl_values(logits, batch, targets).double()
    return torch.cat([values[None], reproduced(logits, batch, targets)]).cpu()
