"""All experts of a recipe scored together: what each component does in the others' company.

What restores a behaviour in the base is not what survives beside another expert. Here all experts
move at once along the guided path (`guided`), towards the sum of their behaviours' ``kl``
recoveries, and one score file is written for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

import torch

from mergekit_wp.criteria import split
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.slopes import Slopes, Term, slopes
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.files import check_folder, company_files, kept_settings, write_company
from mergekit_wp.joint.guided import PathPosition, path_scores
from mergekit_wp.joint.members import Member, measure, open_members
from mergekit_wp.joint.merged_model import mix
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.journal import Journal, begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.references import References, values_of
from mergekit_wp.runs.run import journal_of
from mergekit_wp.runs.warnings import warn_of_completeness, warn_of_recoveries


def score_company(request: CompanyRequest, progress: Progress) -> dict[str, ScoreFile]:
    """Score all experts of a recipe together.

    Where the request has a folder, one file per expert is written there, ``NAME.safetensors``, and
    a recipe that merges by them.

    Returns:
        The score files by the experts' names, in the recipe's order.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
    check_folder(request)
    beside = None if request.out is None else request.out / "company"
    date = begun(beside, request.restart)
    members = open_members(request, request.out, progress, date)
    runs = {member.name: member.run for member in members}
    with journal_of(request, runs, beside, progress, restart=request.restart) as journal:
        references = [measure(member, journal) for member in members]
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
        names = [str(member.request.behavior) for member in members]
        warn_of_recoveries(dict(zip(names, recoveries, strict=True)), progress)
        completeness = {"share/kl": total / recovered} if recovered else {}
        warn_of_completeness(completeness, "path_steps", progress)
        found = company_files(
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
            completeness=completeness,
            command=command_of(request),
            created=journal.created,
        )
        write_company(request.out, found, kept_settings(request.recipe))
        journal.discard()
    return found


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
        self.resident = members[0].run.load()
        wide = torch.promote_types(self.resident.dtype, torch.float32)
        device = self.resident.device
        self.vectors = [TaskVector.of(member.pair, wide, device) for member in members]
        self.at_once = AtOnce(
            max(batch.size for own in references for batch in own.batches), progress.note
        )

    def to_the_end(self) -> list[PathPosition]:
        """Take all steps; returns how far each expert's components came."""
        positions = [PathPosition.at_the_base(self.partition) for _ in self.members]
        n_prompts = sum(len(m.prompts.prompts) for m in self.members)
        self.progress.stage("guided path", self.request.path_steps * n_prompts, "prompt")
        for step in range(self.request.path_steps):
            found = self._slopes(step, positions)
            positions = [
                here.step(slope, 1 / self.request.path_steps)
                for here, slope in zip(positions, found, strict=True)
            ]
        return positions

    def recoveries(self, positions: Sequence[PathPosition]) -> list[float]:
        """How far each behaviour has come back where the components now are."""
        self._move_to(positions)
        decoder, found = Decoder(self.resident.model), []
        for references in self.references:
            reference, every = references.values["kl"], references.batches
            n = reference.base.numel()
            work = partial(values_of, decoder, every, references.targets, ("kl",), n)
            with torch.no_grad():
                values = self.at_once.run(work)["kl"]
            change = float(values.double().mean()) - float(reference.base.double().mean())
            found.append(change / float(reference.distance.double().mean()))
        return found

    def _slopes(self, step: int, positions: Sequence[PathPosition]) -> list[Slopes]:
        """Derivative of the sum of recoveries along every expert's components.

        A batch of every behaviour goes through together, so that differences are read once for all.
        """
        found: list[Slopes] = [{} for _ in self.members]
        moved = False

        def slopes_of(b: int) -> Result:
            nonlocal moved
            if not moved:
                self._move_to(positions)
                moved = True
            return self.at_once.run(partial(self._of_batches, b))

        for b in range(max(len(own.batches) for own in self.references)):
            result, resumed = self.journal.block(
                f"path.step{step:04d}.batch{b:04d}", partial(slopes_of, b)
            )
            for entry, slope in result.items():
                expert, name = entry.split("/", 1)
                own = found[int(expert)]
                own[name] = own.get(name, 0.0) + slope
            n_prompts = sum(own.batches[b].size for own in self._with_batch(b))
            self.progress.advance(n_prompts, resumed=resumed)
        return found

    def _with_batch(self, b: int) -> list[References]:
        return [own for own in self.references if b < len(own.batches)]

    def _of_batches(self, b: int, size: int) -> Result:
        """Slopes on one batch of every behaviour that has it, ``size`` prompts of each at once.

        Returns:
            ``[components of the tensor]`` by "expert/tensor".
        """
        parts = []
        for own in self._with_batch(b):
            weight = 1 / float(own.values["kl"].distance.double().sum())
            pieces = split(own.batches[b], own.targets[b], size)
            parts.append([Term(*piece, weight) for piece in pieces])
        total: Result = {}
        for turn in zip_longest(*parts):
            terms = [term for term in turn if term is not None]
            decoder = Decoder(self.resident.model)
            _, every = slopes(decoder, terms, self.partition.layouts, self.vectors)
            for e, found in enumerate(every):
                for name, slope in found.items():
                    total[f"{e}/{name}"] = total.get(f"{e}/{name}", 0.0) + slope
        return total

    def _move_to(self, positions: Sequence[PathPosition]) -> None:
        """The merge as the method would write it with the present gates."""
        mix(
            self.resident,
            self.members,
            self.partition.layouts,
            lambda e, name: positions[e].gate(name),
        )
