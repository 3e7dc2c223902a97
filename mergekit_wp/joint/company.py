"""All experts of a recipe scored together: what each component does in the others' company.

What restores a behaviour in the base is not what survives beside another expert. Here all experts
move at once along the guided path (`engine.guided`), towards the sum of their behaviours' ``kl``
recoveries, and one score file is written for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import contributions
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.joint.files import recipe_beside, write_company
from mergekit_wp.joint.guided import PathPosition, path_scores
from mergekit_wp.joint.members import Member, inputs_of, measure, open_members
from mergekit_wp.joint.merged_model import mix
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.models.backoff import AtOnce
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Block, Result, SweepContext
from mergekit_wp.runs.references import References, values_of
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.scoring.shares import task_vector


def score_company(request: CompanyRequest, progress: Progress) -> list[Path]:
    """Score all experts of a recipe together; writes one file per expert and a recipe for them.

    Returns:
        The score files, in the recipe's order, and the recipe.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
    recipe = recipe_beside(request.out, request.recipe)
    members = open_members(request, request.out, progress)
    with Journal(request.out / "company", inputs_of(request, members), request.restart) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        references = [measure(member, journal, progress) for member in members]
        walk = Walk(request, members, references, journal, progress)
        positions = walk.to_the_end()
        recoveries = walk.recoveries(positions)
        reached = ", ".join(
            f"{member.request.behavior} {value:.2f}"
            for member, value in zip(members, recoveries, strict=True)
        )
        progress.note(f"behaviours recovered at the end of the path: {reached}")
        total = sum(float(values.sum()) for here in positions for values in here.share.values())
        recovered = sum(recoveries)
        written = write_company(
            recipe,
            members,
            references,
            [
                {
                    "share": here.share_scores(),
                    "path": path_scores(walk.partition, here.path),
                }
                for here in positions
            ],
            recoveries,
            Fidelity(method="guided-path", steps=request.path_steps),
            completeness={"share/kl": total / recovered} if recovered else {},
            command=command_of(request),
            created=journal.created,
        )
        journal.discard()
    return written


class Walk:
    """The guided path of one company, block by block.

    Raises:
        UserError: a block of an earlier run is damaged.
    """

    def __init__(
        self,
        request: CompanyRequest,
        members: Sequence[Member],
        references: Sequence[References],
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.members, self.references = request, members, references
        self.journal, self.progress = journal, progress
        first = members[0].pair
        self.partition = first.partition
        self.resident = ResidentModel(first, DTYPES[request.dtype], request.device)
        self.vectors = [task_vector(member.pair, self.resident) for member in members]
        self.contexts = [
            SweepContext(self.resident, own, ("kl",), max(batch.size for batch in own.batches))
            for own in references
        ]

    def to_the_end(self) -> list[PathPosition]:
        """Take all steps; returns how far each expert's components came."""
        positions = [PathPosition.at_the_base(self.partition) for _ in self.members]
        n_prompts = sum(len(m.texts.prompts) for m in self.members)
        self.progress.stage("guided path", self.request.path_steps * n_prompts, "prompt")
        for step in range(self.request.path_steps):
            slopes = self._slopes(step, positions)
            positions = [
                here.step(slope, 1 / self.request.path_steps)
                for here, slope in zip(positions, slopes, strict=True)
            ]
        return positions

    def recoveries(self, positions: Sequence[PathPosition]) -> list[float]:
        """How far each behaviour has come back where the components now are."""
        self._move_to(positions)
        decoder, found = Decoder(self.resident.model), []
        for references, context in zip(self.references, self.contexts, strict=True):
            reference, every = references.values["kl"], references.batches
            n, at_once = reference.base.numel(), AtOnce(context.batch_size, self.progress.note)
            work = partial(values_of, decoder, every, references.targets, ("kl",), n)
            with torch.no_grad():
                values = at_once.run(work)["kl"]
            change = float(values.double().mean()) - float(reference.base.double().mean())
            found.append(change / float(reference.distance.double().mean()))
        return found

    def _slopes(
        self, step: int, positions: Sequence[PathPosition]
    ) -> list[dict[str, torch.Tensor]]:
        """Derivative of the sum of recoveries along every expert's components."""
        slopes: list[dict[str, torch.Tensor]] = [{} for _ in self.members]
        moved = False

        def contributions_of(context: SweepContext, b: int) -> Result:
            nonlocal moved
            if not moved:
                self._move_to(positions)
                moved = True
            work = partial(self._contributions, context, b)
            return context.fitting(Block("path", 1.0, work, b, prompts=None), self.progress.note)

        for member, references, context in zip(
            self.members, self.references, self.contexts, strict=True
        ):
            distance = references.values["kl"].distance.double()
            scale = 1 / float(distance.sum())
            for b, batch in enumerate(references.batches):
                key = f"path.step{step:04d}.{member.name}.batch{b:04d}"
                result, resumed = self.journal.block(key, partial(contributions_of, context, b))
                for entry, total in result.items():
                    expert, name = entry.split("/", 1)
                    found = slopes[int(expert)]
                    found[name] = found.get(name, 0.0) + total * scale
                self.progress.advance(batch.size, resumed=resumed)
        return slopes

    def _contributions(self, context: SweepContext, b: int) -> Result:
        """Summed over the batch's prompts, or those of its present part.

        Returns:
            ``[components of the tensor]`` by "expert/tensor".
        """
        per_expert = contributions(
            Decoder(self.resident.model),
            context.batch(b),
            self.partition,
            self.vectors,
            ("kl",),
            context.targets(b),
        )["kl"]
        return {
            f"{e}/{name}": value.sum(0).cpu().double()
            for e, found in enumerate(per_expert)
            for name, value in found.items()
        }

    def _move_to(self, positions: Sequence[PathPosition]) -> None:
        """The merge as the method would write it with the present gates."""
        mix(self.resident, self.members, lambda e, name: positions[e].gate(name))
