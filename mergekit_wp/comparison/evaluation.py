"""Make one model and measure it, here or on a cluster; where that fails, it says whose fault it is.

Which errors make a row of the table "failed": the merge's own, never a bug of ours.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.making import Making, Ready
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.request import CompareRequest, fingerprint, make_plan
from mergekit_wp.comparison.results import MERGE, Job, Results
from mergekit_wp.comparison.rows import Cost
from mergekit_wp.errors import DiskError, OutOfMemory, UserError
from mergekit_wp.interrupts import Interrupted, finishing, unmasked
from mergekit_wp.merging.host import raised_by_mergekit
from mergekit_wp.models.encoding import Clock, one_clock
from mergekit_wp.models.memory import UNBOUNDED, AtOnce, is_out_of_memory
from mergekit_wp.runs.cluster import Assignment
from mergekit_wp.runs.progress import NotesOnly, Progress
from mergekit_wp.tasks.task import ItemScore, Task

#: how mergekit refuses a merge, by torch or by itself
_MERGEKITS = (ValueError, RuntimeError, SafetensorError)
#: how folders begin where a worker merges; what is killed leaves its own
WORKER = f"{MERGE}worker."
#: what may be a merge's fault; whatever else is raised ends the comparison
MAY_FAIL = (UserError, *_MERGEKITS)
#: a full disk or a small memory is no property of a merge: these stop the comparison
_NOT_THE_MERGES_FAULT = (OSError, DiskError, OutOfMemory)


def why_failed(error: Exception) -> str | None:
    """Why a merge has no scores, in one sentence.

    Args:
        error: one of `MAY_FAIL`, as it was caught.

    Returns:
        None where the merge is not to blame: an interruption, a full disk, or an error that was
        raised neither by mergekit nor to say what is wrong with the merge.
    """
    if isinstance(unmasked(error), Interrupted) or isinstance(error, _NOT_THE_MERGES_FAULT):
        return None
    if isinstance(error, UserError):
        return str(error)
    if not (is_out_of_memory(error) or raised_by_mergekit(error)):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:500]


@dataclass
class Outcome:
    """What came of the jobs of one model.

    Attributes:
        cost: of the merge, None for a checkpoint and where there is no merge.
        scores: of each job that succeeded.
        failed: why others did not.
    """

    cost: Cost | None = None
    scores: dict[Job, Sequence[ItemScore]] = field(default_factory=dict)
    failed: dict[Job, str] = field(default_factory=dict)

    def add_cost(self, cost: Cost) -> None:
        """What the merge took."""
        self.cost = cost

    def add(self, job: Job, scores: Sequence[ItemScore]) -> None:
        """A job is done."""
        self.scores[job] = scores

    def add_failure(self, job: Job, reason: str) -> None:
        """A job has no scores."""
        self.failed[job] = reason


class Kept(Outcome):
    """What came of the jobs of one model, kept as it comes."""

    def __init__(self, results: Results, progress: Progress, job: Job) -> None:
        """Of any of the jobs."""
        super().__init__()
        self.results, self.progress, self.job = results, progress, job

    def take(self, found: Outcome) -> None:
        """What came of them elsewhere."""
        if found.cost is not None:
            self.add_cost(found.cost)
        for job, scores in found.scores.items():
            self.add(job, scores)
        for job, reason in found.failed.items():
            self.add_failure(job, reason)

    def add_cost(self, cost: Cost) -> None:
        """What the merge took."""
        job = self.job
        self.results.add_cost(job.model, json.loads(job.setting), job.seed, cost)

    def add(self, job: Job, scores: Sequence[ItemScore]) -> None:
        """A job is done."""
        self.results.add(job, scores)
        super().add(job, scores)
        self.progress.advance(1)

    def add_failure(self, job: Job, reason: str) -> None:
        """A job has no scores."""
        self.results.add_failure(job, reason)
        super().add_failure(job, reason)
        self.progress.advance(1)


def evaluate(
    load: Callable[[], Ready],
    jobs: Sequence[tuple[Task, Job]],
    at_once: Mapping[str, AtOnce],
    found: Outcome,
) -> None:
    """Make one model and measure it.

    Args:
        load: makes it.
        jobs: on which tasks.
        at_once: sequences that go through it together, by the name of the task.
        found: takes what comes of it.

    Raises:
        Exception: what is not the merge's fault.
    """

    def record(error: Exception, some: Sequence[Job]) -> None:
        reason = why_failed(error)
        if reason is None:
            raise error
        for job in some:
            if job not in found.scores and job not in found.failed:
                found.add_failure(job, reason)

    try:
        with load() as made:
            if made.cost is not None:
                found.add_cost(made.cost)
            for task, job in jobs:
                try:
                    with finishing():
                        memory = at_once[task.name]
                        found.add(job, task.evaluate(made.model, made.asked, job.split, memory))
                except MAY_FAIL as error:
                    record(error, [job])
    except MAY_FAIL as error:
        record(error, [job for _, job in jobs])


def memories(plan: Plan, told: Callable[[str], None]) -> dict[str, AtOnce]:
    """By task: what fitted one model fits the next, but another task may have longer prompts."""
    return {task.name: AtOnce(UNBOUNDED, told) for task in (*plan.tasks, *plan.keep)}


#: jobs of one model on one split
ModelJobs: TypeAlias = tuple[Job, ...]


@dataclass(frozen=True)
class EvaluationJob:
    """Models that one worker makes and measures, one after the other."""

    models: tuple[ModelJobs, ...]

    @property
    def key(self) -> str:
        """What notes call it."""
        first = self.models[0][0]
        more = f" and {len(self.models) - 1} more" if len(self.models) > 1 else ""
        return f"{first.model} {first.setting}{more}"


@dataclass(frozen=True)
class Evaluations(Assignment):
    """The models of one comparison.

    Attributes:
        request: of the comparison, which every worker reads anew, from the same files.
        inputs: what these have to be, see `fingerprint`.
        date: on which it began.
        folder: of its results; where there is none here, a temporary one is taken.
        options: of mergekit.
        directory: that names of files start from.
    """

    request: CompareRequest
    inputs: Mapping[str, Any]
    date: str
    folder: Path
    options: MergeOptions
    directory: str

    def begin(self, told: Callable[[str], None]) -> Callable[[EvaluationJob], dict[str, Any]]:
        """Read the request, and hold one model.

        Raises:
            UserError: files are others than the driver's.
        """
        torch.set_num_threads(self.models.threads)
        if os.path.isdir(self.directory):  # else names that start from it are not found
            os.chdir(self.directory)
        ensure_registered()
        request = self.request.model_copy(update={"device": self.models.device})
        clock = Clock(self.date)
        with one_clock(clock):
            plan, _ = make_plan(request)
            own = fingerprint(plan)
            if changed := [name for name in self.inputs if own[name] != self.inputs[name]]:
                raise UserError(
                    f"{', '.join(changed)}: others on {socket.gethostname()} than where the "
                    "comparison was started; all machines have to read the same files"
                )
            parent = self.folder if self.folder.is_dir() else None
            place = TemporaryDirectory(prefix=WORKER, dir=parent)
            scratch = Path(place.name)
            making = Making(plan, scratch, scratch, self.date, NotesOnly(told), self.options)
        tasks = {task.name: task for task in (*plan.tasks, *plan.keep)}
        at_once = memories(plan, told)

        def compute(evaluation: EvaluationJob, _place: object = place) -> dict[str, Any]:
            every = []
            with one_clock(clock):
                for jobs in evaluation.models:
                    load, found = partial(making.of_job, jobs[0]), Outcome()
                    evaluate(load, [(tasks[job.task], job) for job in jobs], at_once, found)
                    every.append(found)
            return {"found": every, "dated": clock.was_read}

        return compute
