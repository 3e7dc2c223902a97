"""Fit the gates of several experts jointly.

Every expert is the teacher of its own behaviour: the objective is the mean over behaviours of the
normalised ``kl`` recovery of the merge, on prompts without labels. A guard's teacher is the base.
Joint gates by gradient go back to AdaMerging (arXiv 2310.02575), which fits one coefficient per
layer or task to the entropy of the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.manifest import Fidelity, Fit, Guard, Moment
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.ascent import FitState, Fitting
from mergekit_wp.joint.files import check_folder, company_files, kept_settings, write_company
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.members import Member, measure, open_members
from mergekit_wp.joint.objective import guard_of, objective_of
from mergekit_wp.joint.request import GUARD_WEIGHT, FitRequest, NamedExperts
from mergekit_wp.merging.plan import recipe_gates
from mergekit_wp.prompts import PromptSet, read_prompts
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.journal import begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.run import check_norms, journal_of


def fit(request: FitRequest, progress: Progress) -> dict[str, ScoreFile]:
    """Fit the gates.

    Where the request has a folder, one file per expert is written there, ``NAME.safetensors``, and
    a recipe that merges by them.

    Returns:
        The score files by the experts' names, in the recipe's order.

    Raises:
        UserError: any mistake in the inputs, before anything is fitted.
    """
    if request.guard_weight != GUARD_WEIGHT and not request.guards:
        raise UserError(
            f"{option('guard_weight', f'{request.guard_weight:g}')} weighs guards, and none is "
            f"given; add {option('guards', 'FILE.jsonl')}"
        )
    if request.batch_size is not None:
        raise UserError(
            f"{option('batch_size')} does not go with a fit; give {option('prompts_a_step')}"
        )
    check_folder(request.out, request.recipe)
    beside = None if request.out is None else request.out / "fit"
    date = begun(beside, request.restart)
    members = open_members(request, request.out, progress, date)
    guards = [
        read_prompts(guard, request.max_prompts, f"guard {number}")
        for number, guard in enumerate(request.guards, 1)
    ]
    _check_names([*(member.prompts for member in members), *guards])
    partition = members[0].pair.partition
    changed = tuple(member.pair.changed for member in members)
    layout = Layout(partition, changed, request.granularity)
    start = _start(request, members, layout)
    contents = {
        "guards": [guard.sha256 for guard in guards],
        "start": hashlib.sha256(start.numpy().tobytes()).hexdigest(),
    }
    runs, size = {member.name: member.run for member in members}, request.prompts_a_step
    guarded = [members[0].run.asking(guard) for guard in guards]
    with journal_of(
        request, runs, beside, progress, restart=request.restart, **contents
    ) as journal:
        references = [measure(member, journal, size) for member in members]
        objectives = [objective_of(m, own) for m, own in zip(members, references, strict=True)]
        objectives += [guard_of(guard, members, journal, size) for guard in guarded]
        state = Fitting(request, members, objectives, layout, journal, progress).run(start)
        how = _how(request, guards, state, [objective.name for objective in objectives])
        found = company_files(
            members,
            references,
            [{"path": scores} for scores in layout.path_scores(state.best)],
            [how.reached[str(member.request.behavior)] for member in members],
            Fidelity(method="fitted", steps=state.best_step),
            completeness={},
            finer=None if request.granularity == "component" else layout.unflat(state.best),
            fit=how,
            command=command_of(request),
            created=journal.created,
        )
        write_company(request.out, found, kept_settings(request.recipe))
        journal.discard()
    return found


def _start(request: FitRequest, members: Sequence[Member], layout: Layout) -> torch.Tensor:
    """Flat gates to start from: a constant, or the recipe's own."""
    if request.start == "scores":
        if isinstance(request.recipe, NamedExperts):
            raise UserError(
                f"{option('start', 'scores')} takes the gates by which a recipe merges; give "
                f"{option('recipe', 'FILE')} in place of base and experts"
            )
        own = recipe_gates(request.recipe)
        for member, found in zip(members, own, strict=True):
            for path, file in found.files.items():
                way_out = "give the recipe the scores of its experts"
                check_norms(file.file.delta_norm, member.pair, f"score file {path}", way_out)
        return layout.taking([found.gates for found in own]).clamp(0.0, request.upper)
    try:
        value = float(request.start)
    except ValueError:
        raise UserError(
            f"{option('start', request.start)}: give a number, or 'scores' for the gates by which "
            "the recipe merges, such as those of an earlier fit"
        ) from None
    if not 0 <= value <= request.upper:
        raise UserError(f"{option('start', f'{value:g}')} is not within 0 and {request.upper:g}")
    return torch.full((layout.size,), value * layout.share, dtype=torch.float64)


def _check_names(every: Sequence[PromptSet]) -> None:
    """Refuse behaviours that cannot be told apart: each is called after its prompts.

    Raises:
        UserError: two of one name.
    """
    names = [prompts.name for prompts in every]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(
                f"{every[names.index(name)].source} and {every[i].source} have the same name, "
                f"after which both behaviours would be called '{name}'; rename one"
            )


def _how(
    request: FitRequest,
    guards: Sequence[PromptSet],
    state: FitState,
    names: Sequence[str],
) -> Fit:
    """What the manifests say of the fit."""
    return Fit(
        guards=tuple(
            Guard(behavior=p.name, prompts_sha256=p.sha256, n_prompts=len(p.prompts))
            for p in guards
        ),
        granularity=request.granularity,
        guard_weight=request.guard_weight,
        start=request.start,
        rate=request.rate,
        penalty=request.penalty,
        upper=request.upper,
        prompts_a_step=request.prompts_a_step,
        best_step=state.best_step,
        history=_moments(state.seen, names),
    )


def _moments(seen: torch.Tensor, names: Sequence[str]) -> tuple[Moment, ...]:
    def part(values: torch.Tensor) -> dict[str, float] | None:
        if values.isnan().any():
            return None
        return dict(zip(names, values.tolist(), strict=True))

    return tuple(
        Moment(step=step, fitted=part(fitted), held_out=part(held_out))
        for step, (fitted, held_out) in enumerate(seen)
    )
