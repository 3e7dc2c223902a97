"""What fitted gates are taught: every expert's behaviour, and guards, whose teacher is the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.errors import UserError
from mergekit_wp.joint.members import Member
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.backoff import AtOnce
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch, PromptFile, batches
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.references import References, logprobs, values_of
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.texts import encode_texts, with_responses


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
def guard_of(
    path: Path,
    prompts: PromptFile,
    members: Sequence[Member],
    request: FitRequest,
    journal: Journal,
    progress: Progress,
) -> Objective:
    """What the base does on some prompts; 0 is as far from it as the experts are on average."""
    member = members[0]
    texts = encode_texts(member.tokenizer, prompts.prompts, path)
    texts.check_vocabulary(member.pair.vocabulary)
    resident = ResidentModel(member.pair, DTYPES[request.dtype], request.device)
    samples = with_responses(
        request,
        texts,
        member.tokenizer,
        resident,
        journal,
        progress,
        prefix=f"guard-{path.stem}.",
        position=0.0,
    )
    every = list(batches(samples, request.prompts_a_step, request.device))
    progress.stage(f"base and experts on guard {path.stem}", len(members) + 1, "model")
    resident.move_to(0.0)
    decoder = Decoder(resident.model)
    at_once = AtOnce(request.prompts_a_step, progress.note)
    targets = at_once.run(lambda size: [Targets(logprobs(decoder, batch, size)) for batch in every])
    progress.advance(1)
    total = torch.zeros(len(samples), dtype=torch.float64)
    for other in members:
        resident.fill(other.pair.expert.read)
        values = at_once.run(
            lambda size: values_of(decoder, every, targets, ("kl",), len(samples), size)
        )
        total += values["kl"].double()
        progress.advance(1)
    zero = total / len(members)
    if float(zero.mean()) > -1e-9:
        raise UserError(
            f"guard {path}: the experts answer like the base there, so there is nothing to guard"
        )
    return Objective(path.stem, every, targets, zero, -zero)
