"""All experts of a recipe scored together: what each component does in the others' company.

What restores a behaviour in the base is not what survives beside another expert. Here all experts
move at once along the guided path (`engine.guided`), towards the sum of their behaviours' ``kl``
recoveries, and one score file is written for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import contributions
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.scorefile import CompanyMember, Fidelity, Manifest, ScoreFile, write
from mergekit_wp.joint.guided import PathPosition
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
from mergekit_wp.scoring.assemble import common_fields
from mergekit_wp.scoring.shares import task_vector
from mergekit_wp.terms import Estimand


def score_company(request: CompanyRequest, progress: Progress) -> list[Path]:
    """Score all experts of a recipe together; writes one file per expert and a recipe for them.

    Returns:
        The score files, in the recipe's order, and the recipe.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
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
        written = []
        for e, member in enumerate(members):
            tensors, total = _tensors(members, positions, e)
            manifest = _manifest(
                request, members, references, e, recoveries, total, journal.created
            )
            write(ScoreFile(manifest, tensors), member.request.out)
            written.append(member.request.out)
        written.append(_write_recipe(request, members))
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
        self.progress.stage("guided path", self.request.steps * n_prompts, "prompt")
        for step in range(self.request.steps):
            slopes = self._slopes(step, positions)
            positions = [
                here.step(slope, 1 / self.request.steps)
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


def _tensors(
    members: Sequence[Member], positions: Sequence[PathPosition], e: int
) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of expert e's file, and the sum of all experts' shares."""
    tensors = {
        f"{estimand}/kl/{kind}": value.float()
        for estimand, scores in (
            ("share", positions[e].share_scores()),
            ("path", positions[e].path_scores()),
        )
        for kind, value in scores.items()
    }
    norms = list(members[e].pair.delta_norm.values())
    tensors["delta_norm"] = torch.tensor(norms, dtype=torch.float32)
    total = sum(float(values.sum()) for here in positions for values in here.share.values())
    return tensors, total


def _manifest(
    request: CompanyRequest,
    members: Sequence[Member],
    references: Sequence[References],
    e: int,
    recoveries: Sequence[float],
    total: float,
    created: str,
) -> Manifest:
    member, recovered = members[e], sum(recoveries)
    estimands: tuple[Estimand, ...] = ("share", "path")
    return Manifest(
        **common_fields(member.request, member.pair, member.prompts, references[e]),
        criteria=("kl",),
        estimands=estimands,
        anchor=None,
        fidelity={
            f"{estimand}/kl/{kind}": Fidelity(method="guided-path", steps=request.steps)
            for estimand in estimands
            for kind in member.request.kinds
        },
        noise_floor={},
        completeness={"share/kl": total / recovered} if recovered else {},
        company=tuple(
            CompanyMember(
                reference=m.pair.expert.name,
                weights_sha256=m.weights_sha256,
                behavior=str(m.request.behavior),
                recovery=recovery,
            )
            for m, recovery in zip(members, recoveries, strict=True)
        ),
        command=command_of(request),
        created=created,
    )


def _write_recipe(request: CompanyRequest, members: Sequence[Member]) -> Path:
    """A recipe that merges by the new files, beside them."""
    recipe: Mapping[str, Any] = {
        "merge_method": "weight_patching",
        "base_model": members[0].request.base,
        "models": [
            {"model": m.request.expert, "parameters": {"scores": str(m.request.out)}}
            for m in members
        ],
        "parameters": {"fusion": "path"},
        "dtype": members[0].pair.base.weights_dtype,
    }
    path = request.out / "recipe.yml"
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
