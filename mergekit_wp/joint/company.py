"""All experts of a recipe scored together: what each component does in the others' company.

What restores a behaviour in the base is not what survives beside another expert. Here all experts
move at once along the guided path (`guided`), towards the sum of their behaviours' ``kl``
recoveries, and one score file is written for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mergekit_wp.engine.slopes import Slopes, Term
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.files import check_folder, company_files, kept_settings, write_company
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.guided import PathPosition, path_scores
from mergekit_wp.joint.members import Member, measure, open_members
from mergekit_wp.joint.merged_model import VALUES, MergedModel, slopes_of
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.joint.spread import SpreadModel, merged_model
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.journal import Journal, begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.references import References
from mergekit_wp.runs.run import Opened, check_journal, journal_of
from mergekit_wp.runs.warnings import warn_of_completeness, warn_of_recoveries


@dataclass(frozen=True)
class CompanyOpened(Opened):
    """Experts that can be scored together."""

    request: CompanyRequest


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
    partition = members[0].pair.partition
    layout = Layout(partition, tuple(member.pair.changed for member in members))
    check = partial(check_journal, request, runs, beside, restart=request.restart)
    progress.plan(CompanyOpened(request, tuple(runs.values()), check))
    with journal_of(request, runs, beside, progress, restart=request.restart) as journal:
        references = [measure(member, journal) for member in members]
        size = max(batch.size for own in references for batch in own.batches)
        with merged_model(request, members, layout, size, len(members), progress) as model:
            walk = Walk(request, members, references, layout, model, journal, progress)
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
                    "path": path_scores(partition, here.path),
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
        layout: Layout,
        model: MergedModel | SpreadModel,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.members, self.references = request, members, references
        self.layout, self.model = layout, model
        self.journal, self.progress = journal, progress

    def to_the_end(self) -> list[PathPosition]:
        """Take all steps; returns how far each expert's components came."""
        positions = [PathPosition.at_the_base(self.layout.partition) for _ in self.members]
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
        groups = [
            [Term(*both, 0.0) for both in zip(own.batches, own.targets, strict=True)]
            for own in self.references
        ]
        found = []
        for own, results in zip(self.references, self.model.each(groups), strict=True):
            base = own.values["kl"].base.double()
            values = torch.empty_like(base)
            for batch, result in zip(own.batches, results, strict=True):
                values[batch.members.cpu()] = result[VALUES][0]
            change = float(values.mean()) - float(base.mean())
            found.append(change / float(own.values["kl"].distance.double().mean()))
        return found

    def _slopes(self, step: int, positions: Sequence[PathPosition]) -> list[Slopes]:
        """Derivative of the sum of recoveries along every expert's components.

        A batch of every behaviour goes through together, so that differences are read once for all.
        """
        keys = {
            b: f"path.step{step:04d}.batch{b:04d}"
            for b in range(max(len(own.batches) for own in self.references))
        }
        missing = [b for b, key in keys.items() if not self.journal.has(key)]
        if missing:
            self._move_to(positions)
        each = self.model.each([self._terms(b) for b in missing])
        found: list[Slopes] = [{} for _ in self.members]
        for b, key in keys.items():
            result, resumed = self.journal.block(key, lambda: _summed(next(each)))
            for own, part in zip(found, slopes_of(result, len(self.members)), strict=True):
                for name, slope in part.items():
                    own[name] = own.get(name, 0.0) + slope
            n_prompts = sum(own.batches[b].size for own in self._with_batch(b))
            self.progress.advance(n_prompts, resumed=resumed)
        return found

    def _with_batch(self, b: int) -> list[References]:
        return [own for own in self.references if b < len(own.batches)]

    def _terms(self, b: int) -> list[Term]:
        """One batch of every behaviour that has it."""
        found = []
        for own in self._with_batch(b):
            distance = float(own.values["kl"].distance.double().sum())
            found.append(Term(own.batches[b], own.targets[b], 1 / distance))
        return found

    def _move_to(self, positions: Sequence[PathPosition]) -> None:
        """The merge as the method would write it with the present gates."""
        flat = torch.zeros(self.layout.size, dtype=torch.float64)
        for gates, here in zip(self.layout.unflat(flat), positions, strict=True):
            for kind, own in self.layout.by_kind(gates).items():
                own.copy_(here.path[kind])
        self.model.move_to(flat)


def _summed(results: Sequence[Result]) -> Result:
    """Slopes of all terms together, by "expert/tensor"."""
    total: Result = {}
    for result in results:
        for name, slope in result.items():
            if name != VALUES:
                total[name] = total[name] + slope if name in total else slope
    return total
