"""A comparison from request to result: what the command line and Python both call."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.evaluation import WORKER, Evaluations
from mergekit_wp.comparison.page import html_page
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.request import CompareRequest, fingerprint, make_plan
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.results import MERGE, Results, check_folder
from mergekit_wp.comparison.rows import Comparison, SampleItem, recipe_name
from mergekit_wp.comparison.run import Runner
from mergekit_wp.comparison.table import markdown_table, records, summary, terminal_table
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.merging.model_references import yaml_of
from mergekit_wp.merging.open_models import merge_adapters, place_for_adapters
from mergekit_wp.models.encoding import one_clock
from mergekit_wp.report.table import frame
from mergekit_wp.runs.cluster import Cluster, Machine, cluster, installed
from mergekit_wp.runs.progress import Progress
from mergekit_wp.tasks.task import Task


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found, to be shown or written.

    Attributes:
        comparison: every row with its scores.
        title: of the report.
        recipes: of the merges by row name, with the parameters that were chosen.
        samples: items on which the merges differ, with everybody's answers.
    """

    comparison: Comparison
    title: str
    recipes: Mapping[str, MergeConfiguration]
    samples: tuple[SampleItem, ...] = ()

    @cached_property
    def resampled(self) -> Resampled:
        """The comparison with its intervals."""
        return Resampled(self.comparison)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rows without scores."""
        return tuple(row.name for row in self.comparison.rows if row.failed)

    def table(self) -> str:
        """The table as plain text, for a terminal."""
        return terminal_table(self.resampled)

    def frame(self) -> Any:
        """The table as a pandas frame, one row a model; intervals are columns of their own.

        Raises:
            UserError: pandas is not installed.
        """
        return frame(records(self.resampled))

    def report(self) -> str:
        """The comparison as one offline HTML page."""
        return html_page(self.resampled, self.title, self.samples)

    def write(self, out: Path) -> None:
        """Write summary.json, table.md, report.html and recipes/ into a folder."""
        texts = {
            "summary.json": json.dumps(summary(self.resampled), indent=1),
            "table.md": markdown_table(self.resampled),
            "report.html": self.report(),
        }
        for name, config in self.recipes.items():
            texts[f"recipes/{recipe_name(name)}.yml"] = yaml_of(config)
        for path, text in texts.items():
            with written_whole(out / path) as temporary:
                temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class CompareOpened:
    """A comparison that can begin."""

    request: CompareRequest
    plan: Plan

    def check(self) -> None:
        """Refuse a folder that could not be written, or holds another comparison.

        Raises:
            UserError: says why.
        """
        if self.request.out is not None:
            given = None if self.request.restart else partial(fingerprint, self.plan)
            check_folder(self.request.out, given)


def compare(request: CompareRequest, progress: Progress) -> ComparisonResult:
    """Merge by every method, measure the merges, and write what came out where ``out`` says.

    Raises:
        UserError: any mistake that shows before the first merge, or memory that does not suffice.
        DiskError: the disk is full; what is done is kept.
    """
    if request.ray:
        installed()
    ensure_registered()
    plan, notes = make_plan(request)
    for note in notes:
        progress.note(note)
    progress.plan(CompareOpened(request, plan))
    inputs = fingerprint(plan)
    with _folder(request) as folder, Results(folder, inputs, request.restart) as results:
        models = [ModelReference.parse(expert) for expert in plan.experts]
        adapters = folder / f"{MERGE}adapters"
        with (
            place_for_adapters(models, MergeOptions(quiet=True), adapters) as options,
            one_clock(results.clock),
        ):
            merge_adapters(models, options)
            runner = Runner(plan, results, progress, options)
            with _workers(request, inputs, results, options, progress) as runner.workers:
                comparison = runner.run()
            cut = cut_short(results, (*plan.tasks, *plan.keep))
            comparison = replace(comparison, warnings=(*comparison.warnings, *cut))
            samples = results.samples(comparison, plan.tasks)
    title = f"{len(plan.experts)} experts merged: {', '.join(plan.names)}"
    found = ComparisonResult(comparison, title, runner.chosen, samples)
    if request.out is not None:
        found.write(request.out)
    return found


@contextmanager
def _workers(
    request: CompareRequest,
    inputs: Mapping[str, Any],
    results: Results,
    options: MergeOptions,
    progress: Progress,
) -> Iterator[Cluster | None]:
    """Those of a cluster, if they were asked for."""
    if not request.ray:
        yield None
        return
    assignment = Evaluations(
        Machine.like_here(request.device),
        request,
        inputs,
        results.clock.date,
        results.folder.absolute(),
        options,
        os.getcwd(),
    )
    try:
        with cluster(assignment, progress) as workers:
            yield workers
    finally:
        for place in results.folder.glob(f"{WORKER}*"):
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _folder(request: CompareRequest) -> Iterator[Path]:
    """Where results are kept as they come: for good, or until the comparison ends."""
    if request.out is not None:
        yield request.out
        return
    with TemporaryDirectory() as scratch:
        yield Path(scratch)


def cut_short(results: Results, tasks: Sequence[Task]) -> Iterator[str]:
    """A warning for each task on whose test items right answers had no token to end with."""
    for task in tasks:
        cut: Counter[str] = Counter()
        for job, lines in results.done.items():
            if (job.task, job.split) == (task.name, "test"):
                cut[job.model] += sum(line.cut for line in lines)
        if named := ", ".join(f"{model} {n}" for model, n in cut.items() if n):
            yield (
                f"warning: right answers to task '{task.name}' had not ended at the most tokens "
                f"they may have, and count as wrong ({named}); allow more (max_new_tokens)"
            )
