"""Fit the gates of several experts jointly.

Every expert is the teacher of its own behaviour: the objective is how far the merge has come from
the base's divergence from it to none, on prompts without labels, the worst behaviour counting most.
A guard's teacher is the base, and it has a limit instead of a weight.
Joint gates by gradient go back to AdaMerging (arXiv 2310.02575), which fits one coefficient per
layer or task to the entropy of the answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.fit_section import ENOUGH, Fit, FrontPoint, Guard, Moment, Seen
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.ascent import FitState, Fitting
from mergekit_wp.joint.files import check_folder, company_files, kept_settings, write_company
from mergekit_wp.joint.front import front
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.judging import FEW, PromptSplit
from mergekit_wp.joint.members import Member, measure, open_members, refuse_contrary
from mergekit_wp.joint.objective import guard_of, objective_of
from mergekit_wp.joint.request import FitRequest, NamedExperts
from mergekit_wp.joint.spread import merged_model
from mergekit_wp.joint.weighing import NOTHING
from mergekit_wp.merging.plan import recipe_gates
from mergekit_wp.prompts import PromptSet, read_prompts
from mergekit_wp.runs.command import command_of
from mergekit_wp.runs.journal import begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.run import Opened, Run, check_journal, journal_of
from mergekit_wp.runs.scored import check_norms
from mergekit_wp.runs.warnings import warn_of_dtype
from mergekit_wp.tasks.behaviors import plain_text


@dataclass(frozen=True)
class FitOpened(Opened):
    """A fit that can begin.

    Attributes:
        guards: the models on the guards' prompts.
        a_step: prompts of every behaviour in a step.
        gates: of all experts.
    """

    request: FitRequest
    guards: tuple[Run, ...]
    a_step: int
    gates: int


def fit(request: FitRequest, progress: Progress) -> dict[str, ScoreFile]:
    """Fit the gates.

    Where the request has a folder, one file per expert is written there, ``NAME.safetensors``, and
    a recipe that merges by them.

    Returns:
        The score files by the experts' names, in the recipe's order.

    Raises:
        UserError: any mistake in the inputs, before anything is fitted.
    """
    if request.unguarded and request.guards:
        raise UserError(f"{option('unguarded')} and {option('guards')} exclude each other")
    if request.unguarded and request.limit != FitRequest.model_fields["limit"].default:
        raise UserError(f"{option('limit')} is of guards; leave out {option('unguarded')} or it")
    _check_front(request)
    constant = _start_number(request)
    if request.batch_size is not None:
        raise UserError(
            f"{option('batch_size')} does not go with a fit; give {option('prompts_a_step')}"
        )
    check_folder(request)
    beside = None if request.out is None else request.out / "fit"
    date = begun(beside, request.restart)
    guards = guard_prompts(request)
    limits = _limits(request, guards)
    members = open_members(request, request.out, progress, date)
    refuse_contrary(members, guards)
    _check_names(
        [
            *((str(member.request.behavior), member.prompts) for member in members),
            *((guard.name, guard) for guard in guards),
        ]
    )
    partition = members[0].pair.partition
    changed = tuple(member.pair.changed for member in members)
    layout = Layout(partition, changed, request.granularity)
    start = _start(request, constant, members, layout)
    contents = {
        "guards": [guard.sha256 for guard in guards],
        "start": hashlib.sha256(start.numpy().tobytes()).hexdigest(),
    }
    runs = {member.name: member.run for member in members}
    size = request.prompts_a_step or a_step(min(len(m.prompts.prompts) for m in members))
    guarded = [members[0].run.asking(guard) for guard in guards]
    check = partial(check_journal, request, runs, beside, restart=request.restart, **contents)
    warn_of_dtype(request, progress)
    progress.plan(
        FitOpened(request, tuple(runs.values()), check, tuple(guarded), size, layout.size)
    )
    with journal_of(
        request, runs, beside, progress, restart=request.restart, **contents
    ) as journal:
        splits = [split_of(request, len(member.prompts.prompts)) for member in members]
        references = [
            measure(member, journal, size, split.judged)
            for member, split in zip(members, splits, strict=True)
        ]
        every = zip(members, references, splits, strict=True)
        behaviors = [objective_of(*each) for each in every]
        guarding = [
            guard_of(
                guard, journal, size, math.log(limit), split_of(request, len(guard.prompts.prompts))
            )
            for guard, limit in zip(guarded, limits, strict=True)
        ]
        together = len(behaviors) + len(guarding)
        with merged_model(request, members, layout, size, together, progress) as model:
            fitting = Fitting(request, model, behaviors, guarding, layout, journal, progress)
            state = fitting.run(start)
            points = front(fitting, state)
        how = _how(request, guards, state, points, fitting, size)
        for line in warnings(how):
            progress.note(line)
        found = company_files(
            members,
            references,
            layout.path_scores(state.kept),
            [1 - how.reached[own.name].kl / own.span for own in behaviors],
            finer=None if request.granularity == "component" else layout.unflat(state.kept),
            fit=how,
            command=command_of(_repeating(request, state)),
            created=journal.created,
        )
        write_company(request.out, found, kept_settings(request.recipe))
        journal.discard()
    return found


def split_of(request: FitRequest, prompts: int) -> PromptSplit:
    """Which of so many prompts of a behaviour or guard are fitted on, and which judged by."""
    return PromptSplit.of(prompts, request.held_out, request.seed)


def _repeating(request: FitRequest, state: FitState) -> FitRequest:
    """What a fit is asked for that ends where this one did, which may have been stopped before."""
    return request.model_copy(update={"steps": max(request.steps, state.climb.steps)})


def a_step(prompts: int) -> int:
    """How many prompts of a behaviour a step takes, of so many."""
    return min(16, max(4, prompts // 4))


def _check_front(request: FitRequest) -> None:
    """Refuse further limits that are none.

    Raises:
        UserError: without guards, or in another order.
    """
    if request.front and request.unguarded:
        raise UserError(
            f"{option('front')} are limits of guards; leave out {option('unguarded')} or them"
        )
    if request.front and len(request.limit_of) >= max(1, len(request.guards)):
        raise UserError(
            f"{option('front')} are further limits of guards without one of their own, and each "
            f"has; leave out {option('front')} or one {option('limit_of')}"
        )
    limits = [request.limit, *request.front]
    if any(one >= after for one, after in pairwise(limits)):
        given = option("front", ",".join(f"{limit:g}" for limit in request.front))
        raise UserError(
            f"{given}: expected limits that rise from {option('limit', f'{request.limit:g}')} on; "
            "give each larger than the one before"
        )


def _start_number(request: FitRequest) -> float | None:
    """The constant that gates start from; None for those of the recipe.

    Raises:
        UserError: there is no recipe, or no such number.
    """
    if request.start == "scores":
        if isinstance(request.recipe, NamedExperts):
            raise UserError(
                f"{option('start', 'scores')} begins with the gates by which a recipe merges, and "
                "base and experts are given without one; give such a recipe in their place, as the "
                f"recipe.yml of an earlier fit, or {option('start')} a number"
            )
        return None
    try:
        value = float(request.start)
    except ValueError:
        raise UserError(
            f"{option('start', request.start)}: give a number, or 'scores' for the gates by which "
            "the recipe merges, such as those of an earlier fit"
        ) from None
    if not 0 <= value <= request.upper:
        raise UserError(f"{option('start', f'{value:g}')} is not within 0 and {request.upper:g}")
    return value


def _start(
    request: FitRequest, constant: float | None, members: Sequence[Member], layout: Layout
) -> torch.Tensor:
    """Flat gates to start from: a constant, or the recipe's own."""
    if constant is not None:
        return constant * layout.share
    assert not isinstance(request.recipe, NamedExperts)  # see `_start_number`
    own = recipe_gates(request.recipe)
    for member, found in zip(members, own, strict=True):
        for path, file in found.files.items():
            way_out = "give the recipe the scores of its experts"
            check_norms(file.file.delta_norm, member.pair, f"score file {path}", way_out)
    return layout.taking([found.gates for found in own]).clamp(0.0, request.upper)


def _check_names(every: Sequence[tuple[str, PromptSet]]) -> None:
    """Refuse behaviours and guards that cannot be told apart.

    Raises:
        UserError: two of one name.
    """
    named: dict[str, str] = {}
    for name, prompts in every:
        if name in named:
            raise UserError(
                f"{named[name]} and {prompts.source} have the same name, "
                f"after which both behaviours would be called '{name}'; rename one"
            )
        named[name] = prompts.source


def guard_prompts(request: FitRequest) -> list[PromptSet]:
    """What guards are asked; plain text of our own where none is given."""
    if request.unguarded:
        return []
    if not request.guards:
        return [plain_text()]
    return [
        read_prompts(guard, request.max_prompts, f"guard {number}", distinct=True)
        for number, guard in enumerate(request.guards, 1)
    ]


def _limits(request: FitRequest, guards: Sequence[PromptSet]) -> list[float]:
    """What each guard allows.

    Raises:
        UserError: a limit is of no guard, or a guard has two.
    """
    names, own = [guard.name for guard in guards], dict[str, float]()
    for name, limit in request.limit_of:
        given = option("limit_of", f"{name}={limit:g}")
        if name not in names:
            known = f"expected one of {', '.join(names)}" if names else "nothing is guarded"
            raise UserError(f"{given} is of no guard; {known}")
        if name in own:
            raise UserError(f"{given}: '{name}' has a limit already; give each guard one")
        own[name] = limit
    return [own.get(name, request.limit) for name in names]


def _how(
    request: FitRequest,
    guards: Sequence[PromptSet],
    state: FitState,
    points: Sequence[FitState],
    fitting: Fitting,
    size: int,
) -> Fit:
    """What the manifests say of the fit."""
    names = [objective.name for objective in fitting.objectives]
    # a running mean of zeros alone is none
    prices = torch.where(state.prices > NOTHING, state.prices, 0.0).tolist()
    return Fit(
        guards=tuple(
            Guard(
                behavior=p.name,
                prompts_sha256=p.sha256,
                prompt_digests=p.digests,
                n_prompts=len(p.prompts),
                price=price,
                limit=dict(request.limit_of).get(p.name),
            )
            for p, price in zip(guards, prices, strict=True)
        ),
        granularity=request.granularity,
        limit=request.limit if guards else None,
        start=request.start,
        rate=request.rate,
        shrinkage=request.shrinkage,
        upper=request.upper,
        prompts_a_step=size,
        held_out={own.name: own.split.held_out for own in fitting.objectives},
        done=state.judge.done,
        best_step=state.judge.step,
        history=_moments(state.seen, names),
        front=tuple(
            FrontPoint(limit=limit, reached=_by_name(point.reached, names))
            for limit, point in zip(request.front, points, strict=True)
        ),
    )


def _by_name(values: torch.Tensor, names: Sequence[str]) -> dict[str, Seen]:
    found = zip(names, *values.tolist(), strict=True)
    return {name: Seen(kl=kl, answers=whole, tokens=part) for name, kl, whole, part in found}


def _moments(seen: torch.Tensor, names: Sequence[str]) -> tuple[Moment, ...]:
    def part(values: torch.Tensor) -> dict[str, Seen] | None:
        return None if values.isnan().any() else _by_name(values, names)

    return tuple(
        Moment(step=step, fitted=part(fitted), judged=part(judged))
        for step, (fitted, judged) in enumerate(seen)
    )


def warnings(how: Fit) -> Iterator[str]:
    """What a user is told who would not otherwise see that a fit fell short."""
    guards = {guard.behavior: guard for guard in how.guards}
    if few := [name for name, n in how.held_out.items() if n == 0 and name not in guards]:
        yield (
            f"warning: of {', '.join(few)} no prompts are held out (fewer than {FEW}, or "
            f"{option('held_out', 0)}): what is reproduced is of those that were fitted on, and "
            "says little of others; give more prompts, or measure with `mergekit-wp compare`"
        )
    for name, seen in how.reached.items():
        if name in guards:
            own = guards[name].limit
            by = "limit" if own is None else "limit_of"
            given = option(by, f"{name}={own:g}" if own else how.limit)
            if not how.held(name):
                way_out = f"give a larger {option(by)}"
                if not how.done:
                    way_out = f"the fit was not done: {_more_steps()}; or {way_out}"
                yield (
                    f"warning: {name} is at {seen.ratio:.3f} times the base's perplexity, beyond "
                    f"{given}, which was {how.verdict(name)}; {way_out}"
                )
            if seen.tokens < ENOUGH:
                yield (
                    f"warning: of the base's own tokens on {name} {seen.tokens:.2f} are still the "
                    f"likeliest; a smaller {option(by)} keeps more"
                )
        elif seen.answers < ENOUGH:
            yield (
                f"warning: of {name} only {seen.answers:.2f} of the expert's answers are "
                f"reproduced whole, and {seen.tokens:.2f} of their tokens; "
                f"{_way_out(how)}. Other words may be right, too: `mergekit-wp compare` "
                "measures the skill itself"
            )


def _more_steps() -> str:
    return (
        f"give more {option('steps')}, and go on from its recipe by `mergekit-wp fit RECIPE` with "
        f"{option('start', 'scores')}"
    )


def _way_out(how: Fit) -> str:
    if not how.done:
        return f"the fit was not done: {_more_steps()}"
    ways = ["give more prompts"]
    if how.granularity != "channel":
        ways.append(f"finer gates, {option('granularity', 'channel')}")
    binding = [guard for guard in how.guards if guard.price > 0]
    for by in dict.fromkeys("limit" if guard.limit is None else "limit_of" for guard in binding):
        shown = f" ({option('front')} shows what each buys)" if by == "limit" else ""
        ways.append(f"a larger {option(by)} for what is guarded{shown}")
    return f"{', or '.join(ways)}; where nothing helps, these experts cannot share one model"
