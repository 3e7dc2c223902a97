"""What the leading components of a score file do together: restoration and knockout of sets.

Base plus the top K components (restoration) and expert minus them (knockout), beside the bottom K
and random sets of the same size and kinds. The curve over K is the file's report card; it is
written into its manifest ("Weight Patching", Sun et al., arXiv 2604.13694).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mergekit_wp.errors import UserError, option
from mergekit_wp.files import scorefile
from mergekit_wp.files.manifest import SetPoint, Verification
from mergekit_wp.mechanism.request import VerifyRequest
from mergekit_wp.mechanism.set_values import (
    BEHAVIOR,
    SetInputs,
    SetMeasurement,
    Sets,
    Swap,
    Whole,
    set_criteria,
    set_targets,
    swaps,
)
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import batches, read_prompts
from mergekit_wp.runs.cluster import SentModels
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.journal import begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.run import Opened, Run, check_journal, journal_of
from mergekit_wp.runs.scored import check_pair, check_scores, scored_model
from mergekit_wp.runs.warnings import warn_of_dtype
from mergekit_wp.statistics import Array, bootstrap, mib_sizes, percentiles
from mergekit_wp.tasks import behaviors
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.terms import CRITERIA, Direction, SetName

#: what stands for the sizes of MIB's circuits
MIB = "mib"


@dataclass(frozen=True)
class VerifyOpened(Opened):
    """A curve that can be measured.

    Attributes:
        models: how many are measured: base, expert and every set.
        criteria: by how many.
        task: whose answers are checked.
    """

    request: VerifyRequest
    models: int
    criteria: int
    task: JsonlTask | None


def verify(request: VerifyRequest, task: JsonlTask | None, progress: Progress) -> Verification:
    """Measure the sets and write the curve into the score file's manifest.

    Args:
        request: the run.
        task: items whose answers are checked, None for criteria only.
        progress: told of every set.

    Raises:
        UserError: any mistake in the inputs, before anything is measured.
    """
    file = scorefile.read(request.file)
    estimand = request.estimand or file.manifest.estimands[0]
    criterion = request.criterion or file.manifest.criteria[0]
    check_scores(file, request.file, (estimand,), criterion)
    fine = file.fine_scores(estimand, criterion)
    if not fine:
        raise UserError(f"score file {request.file} has only whole layers; no sets to verify")
    total = sum(part.numel() for part in fine.values())
    sizes = sizes_of(request.top, total)
    if task is not None and not task.count("test"):
        raise UserError(f"task '{task.name}' has no 'test' items")
    prompts = read_prompts(request.prompts, request.max_prompts)
    base = request.base or scored_model(file.manifest.base)
    expert = request.expert or scored_model(file.manifest.expert)
    beside = request.file.with_name(request.file.name + ".verify")
    date = begun(beside, request.restart)
    if task is not None and task.said:
        progress.note(task.said)
    run = Run.open(request, base, expert, prompts, progress, date)
    check_pair(file, run.pair, request.file)
    contents = {"scores": file.digest(), "task": task.fingerprint if task else None}
    kept: dict[str, Any] = {"restart": request.restart, **contents}
    check = partial(check_journal, request, run, beside, **kept)
    wanted: list[Whole | Swap] = [Whole("base"), Whole("expert")]
    wanted += swaps(sizes, request.draws)
    by = len(file.manifest.criteria)
    warn_of_dtype(request, progress)
    progress.plan(VerifyOpened(request, (run,), check, len(wanted), by, task))
    with journal_of(request, run, beside, progress, **kept) as journal:
        resident = run.load()
        if task is not None and (note := task.too_long(resident.model, run.tokenizer)):
            progress.note(note)
        samples = run.samples(resident, journal)
        size = run.batch_size(samples)
        every = list(batches(samples, size, request.device, resident.side))
        at_once = AtOnce(size, progress.note)
        if unknown := [c for c in file.manifest.criteria if c not in CRITERIA]:
            progress.note(f"no curve by '{unknown[0]}': a caller's function is not in its file")
        inputs = SetInputs(
            fine=fine,
            seed=request.seed,
            batches=every,
            targets=set_targets(resident, every, file, at_once),
            criteria=set_criteria(file),
            task=task,
            asked=run.interface,
            at_once=at_once.size,
        )
        work = SetMeasurement(resident, inputs, progress.note)

        def assignment(models: SentModels) -> Sets:
            return Sets(models, inputs.on("cpu"))

        with run.jobs(journal, resident, assignment) as jobs:
            found = dict(jobs.finished("sets", "set", wanted, work))
        ends = found[Whole("base")], found[Whole("expert")]
        for measure, value in ends[0].items():
            if float(value.mean()) == float(ends[1][measure].mean()):
                progress.note(f"'{measure}' is alike at base and expert, so it has no curve")
        verification = Verification(
            estimand=estimand,
            criterion=criterion,
            prompts_sha256=prompts.sha256,
            n_prompts=len(samples),
            n_items=task.count("test") if task else 0,
            n_components=total,
            draws=request.draws,
            points=tuple(_points(sizes, request, ends, found)),
            seed=request.seed,
            command=command_of(request),
            versions=versions(),
            template_date=run.template_date,
        )
        manifest = file.manifest.model_copy(update={"verification": verification})
        scorefile.write(replace(file, manifest=manifest), request.file)
        journal.discard()
    return verification


def _points(
    sizes: Sequence[int],
    request: VerifyRequest,
    ends: tuple[Result, Result],
    found: Mapping[Whole | Swap, Result],
) -> list[SetPoint]:
    points = []
    names: tuple[SetName, ...] = ("top", "bottom", "random")
    directions: tuple[Direction, ...] = ("restoration", "knockout")
    # a journal gives its blocks back in the order of their names
    for measure in (name for name in (*CRITERIA, BEHAVIOR) if name in ends[0]):
        rng = np.random.default_rng([request.seed, *measure.encode()])
        base, expert = (end[measure].numpy() for end in ends)
        counts = bootstrap(len(base), rng) / len(base)
        for direction in directions:
            for size in sizes:
                for name in names:
                    draws = request.draws if name == "random" else 1
                    rows = [found[Swap(direction, name, size, d)][measure] for d in range(draws)]
                    values = np.stack([row.numpy() for row in rows])
                    point = estimate(values, base, expert, counts, direction, rng)
                    if point is None:
                        continue
                    value, low, high = point
                    points.append(
                        SetPoint(
                            direction=direction,
                            set=name,
                            size=size,
                            measure=measure,
                            value=value,
                            low=low,
                            high=high,
                        )
                    )
    return points


def estimate(
    values: Array, base: Array, expert: Array, counts: Array, direction: Direction, rng: Any
) -> tuple[float, float, float] | None:
    """How far sets bring the base towards the expert, or the expert back, with 95% intervals.

    Args:
        values: ``[draws, prompts]`` with the set swapped.
        base: ``[prompts]``.
        expert: ``[prompts]``.
        counts: ``[resamples, prompts]`` weights that sum to 1.
        direction: restoration is the recovery; knockout is 1 minus it.
        rng: resamples the draws.

    Returns:
        Value, low and high; None where base and expert do not differ.
    """
    distance = float((expert - base).mean())
    if distance == 0:
        return None
    recovered = (values.mean(1).mean() - base.mean()) / distance
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=len(counts))
    resampled = ((counts @ values.T) * (weights / len(values))).sum(1)
    apart = counts @ (expert - base)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (resampled - counts @ base) / apart
    drawn = drawn[np.isfinite(drawn)]
    if direction == "knockout":
        recovered, drawn = 1 - recovered, 1 - drawn
    found = percentiles(float(recovered), drawn)
    return found.value, found.low, found.high


def items_of(request: VerifyRequest, given: JsonlTask | None = None) -> JsonlTask | None:
    """Items whose answers are checked: those of a caller, of a file, or of a built-in behaviour.

    Raises:
        UserError: both of the first two are given, checkers of nothing, or a bad file.
    """
    if request.checkers is not None and request.task is None:
        raise UserError(f"{option('checkers')} goes with {option('task')}")
    if given is not None and request.task is not None:
        raise UserError(f"items and {option('task', request.task)} are two tasks; give one")
    if given is not None or (request.task is None and request.builtin is None):
        return given
    with TemporaryDirectory() as scratch:
        path = request.task or Path(scratch, f"{request.builtin}.items.jsonl")
        if request.task is None:
            lines = behaviors.behavior(str(request.builtin)).items()
            path.write_text(behaviors.jsonl(lines), encoding="utf-8")
        return JsonlTask.read(
            path,
            Checkers.load(request.checkers),
            usual="test",
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
        )


def sizes_of(top: Sequence[str], total: int) -> list[int]:
    """Sizes of sets as they are written, of so many components.

    Raises:
        UserError: one is no size, or none of that many.
    """
    sizes = []
    for text in top:
        if text == MIB:
            sizes += mib_sizes(total)[:-1]  # the last is the whole, which is the other checkpoint
            continue
        try:
            percent = text.endswith("%")
            part = Fraction(text.removesuffix("%")) / 100  # a float's noise would round up
            size = math.ceil(part * total) if percent else int(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"{option('top')}: '{text}' is no size; write a count, 5% or {MIB}"
            ) from None
        if not 0 < size <= total:
            raise UserError(f"{option('top', text)}: the file scores {total} components")
        sizes.append(size)
    return sorted(set(sizes))
