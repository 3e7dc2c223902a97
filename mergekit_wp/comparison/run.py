"""Run a comparison: merge, evaluate, choose on validation items, report on test items.

On a cluster the same way is gone several times over. Whatever is not measured yet is noted instead,
with all that does not depend on it, and measured by the workers; the last time nothing is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_wp.comparison import select
from mergekit_wp.comparison.evaluation import EvaluationJob, Kept, ModelJobs, evaluate, memories
from mergekit_wp.comparison.making import Making
from mergekit_wp.comparison.methods import (
    OURS,
    TASK_ARITHMETIC,
    Method,
    peers,
    weights_of,
    with_aim,
)
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import MERGE, Job, Results
from mergekit_wp.comparison.rows import (
    EQUAL,
    UNTUNED,
    Comparison,
    Row,
    Setting,
    Trial,
    perplexity,
    reference_of,
)
from mergekit_wp.errors import UserError
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.runs.cluster import Cluster
from mergekit_wp.runs.progress import Progress
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import RowRole, Split


@dataclass
class Runner:
    """One comparison under way.

    Attributes:
        plan: what is compared.
        results: finished jobs.
        progress: told of every job, and of every step back where memory runs out.
        options: of mergekit, for all merges.
        workers: make and measure models, if not this process.
    """

    plan: Plan
    results: Results
    progress: Progress
    options: MergeOptions = field(default_factory=lambda: MergeOptions(quiet=True))
    workers: Cluster | None = None
    chosen: dict[str, MergeConfiguration] = field(default_factory=dict)
    #: by the name of a tuned row, how it is measured with other parameters on test items
    _again: dict[str, Callable[[Trial], Row]] = field(default_factory=dict)

    def run(self) -> Comparison:
        """Everything, in the order of the table."""
        with tempfile.TemporaryDirectory(prefix=MERGE, dir=self.results.folder) as scratch:
            return self._run(Path(scratch))

    def _run(self, scratch: Path) -> Comparison:
        plan = self.plan
        every = (*plan.tasks, *plan.keep)
        self.at_once = memories(plan, self.progress.note)
        self.ceiling: dict[str, dict[str, float]] = {}
        #: what is to be measured; None where it is measured at once
        self.wanted: list[ModelJobs] | None = None
        self.waiting: set[str] = set()  # methods that nothing can be chosen of yet
        #: jobs in the order in which one process does them
        self.order: list[Job] = []
        self.spread: set[Job] = set()  # what workers have just done
        date = self.results.clock.date
        self.making = Making(plan, self.results.folder, scratch, date, self.progress, self.options)
        for task in every:
            if note := task.too_long(self.making.evaluation.model, self.making.tokenizer):
                self.progress.note(note)
        splits: tuple[Split, ...] = ("valid", "test") if plan.tuned else ("test",)
        self.progress.stage("comparing", self._count_jobs(len(splits)), "job")
        while self.workers is not None and (wanted := self._missing(splits)):
            self._measured_by(self.workers, wanted)
        rows = self._rows(splits)
        if all(row.failed is not None for row in rows):
            raise UserError(
                f"nothing could be compared, for every model failed; {rows[0].name}: "
                f"{rows[0].failed}"
            )
        reference = reference_of(rows)
        bound, equal = self._at_equal_perplexity(rows, reference)
        if self.workers is not None:
            self.results.settle(self.order)
        return Comparison(
            rows=tuple(rows),
            tasks=tuple(self._task_names),
            relative=plan.relative,
            reference=reference,
            bound=bound,
            equal=equal,
            warnings=plan.warnings,
        )

    def _at_equal_perplexity(
        self, rows: Sequence[Row], reference: str
    ) -> tuple[float | None, dict[str, Row]]:
        """Each method with the best parameters that leave plain text as good as the reference does.

        Returns:
            The bound, which is at least 1, and rows by the name of the method's.
        """
        base, by_name = rows[0], {row.name: row for row in rows}
        reached = by_name[reference].perplexity(base)
        if base.failed is not None or reached is None:
            return None, {}
        bound, equal, again = max(1.0, reached), {}, []
        for row in rows:
            if row.failed is not None or row.role not in ("ours", "peer"):
                continue
            own = row.perplexity(base)
            if row.valid is None or row.name == reference:
                if own is not None and own <= bound:
                    equal[row.name] = replace(row, name=row.name + EQUAL)
            elif fit := select.within(row.trials, bound):
                again.append((row, select.best(fit)))
        if self.wanted is None:
            self.progress.stage("the best at equal perplexity", len(again), "method")
        for row, trial in again:
            found = self._again[row.name](trial)
            equal[row.name] = replace(found, name=row.name + EQUAL)
            if self.wanted is None:
                self.progress.advance(1)
        return bound, {name: row for name, row in equal.items() if row.failed is None}

    def _rows(self, splits: Sequence[Split]) -> list[Row]:
        """Everything, in the order of the table."""
        plan = self.plan
        rows = [self._checkpoint_row("base", "base", self.making.base, splits)]
        for name, reference in zip(plan.names, plan.experts, strict=True):
            rows.append(
                self._checkpoint_row(f"expert {name}", "expert", Checkpoint(reference), splits)
            )
        known = not self._waits()
        for split in splits if plan.relative and known else ():
            experts = [self._scores(f"expert {n}", {}, 0, split) for n in plan.names]
            scored = [scores for scores in experts if scores is not None]
            self.ceiling[split] = select.ceilings(scored, self._task_names, split)
        won: dict[str, Setting] = {}
        for method in plan.methods:
            rows += self._method_rows(method, won, chooses=known)
        for name, config in plan.extra.items():
            rows.append(self._recipe_row(name, config))
        return rows

    def _waits(self, before: int = 0) -> bool:
        """Whether more is to be measured than before."""
        return self.wanted is not None and len(self.wanted) > before

    def _missing(self, splits: Sequence[Split]) -> list[ModelJobs]:
        """All that has to be measured, and can be by what is known now."""
        self.wanted, self.waiting = [], set()
        rows = self._rows(splits)
        if not self.wanted and any(row.failed is None for row in rows):
            self._at_equal_perplexity(rows, reference_of(rows))
        wanted, self.wanted, self.waiting = self.wanted, None, set()
        found, seen = list[ModelJobs](), set[Job]()
        for jobs in wanted:  # a text is asked of a setting for two reasons
            if new := tuple(job for job in jobs if job not in seen):
                found.append(new)
                seen.update(new)
        return found

    def _measured_by(self, workers: Cluster, wanted: Sequence[ModelJobs]) -> None:
        """Have workers make and measure models; one that learns first is one worker's."""
        learning = {m.name for m in self.plan.methods if m.peer is not None and m.peer.learns}
        groups: dict[str, list[ModelJobs]] = {}
        for number, jobs in enumerate(wanted):
            model = jobs[0].model
            groups.setdefault(model if model in learning else str(number), []).append(jobs)

        def keep(evaluation: EvaluationJob, result: dict[str, Any]) -> None:
            if result["dated"]:
                self.results.clock.read()
            for jobs, found in zip(evaluation.models, result["found"], strict=True):
                Kept(self.results, self.progress, jobs[0]).take(found)
                self.spread.update(jobs)

        workers.run([EvaluationJob(tuple(group)) for group in groups.values()], keep)

    @property
    def _task_names(self) -> list[str]:
        return [task.name for task in self.plan.tasks]

    def _count_jobs(self, n_splits: int) -> int:
        plan, n = self.plan, len(self.plan.experts)
        models, tested = n_splits * (1 + n) + len(plan.extra), n + 1 + len(plan.extra)
        validated = 1 + n if plan.tuned else 0
        for method in plan.methods:
            draws = plan.seeds if method.draws else 1
            tests = draws * (2 if plan.tuned and method.name == OURS else 1)
            tries = method.tries(n) if plan.tuned else 0
            models += tests + tries
            tested += tests
            validated += tries
        return models * len(plan.tasks) + tested * len(plan.keep) + validated * len(plan.texts)

    def _checkpoint_row(
        self, name: str, role: RowRole, checkpoint: Checkpoint, splits: Sequence[Split]
    ) -> Row:
        if role == "expert" and self.wanted is None and checkpoint.tokenizer() is None:
            self.progress.note(f"'{checkpoint.name}' has no tokenizer; that of the merges is used")
        for split in splits:
            self._measure(name, {}, 0, split)
        return self._row(name, role, name, {}, (0,), None)

    def _method_rows(
        self, method: Method, won: dict[str, Setting], *, chooses: bool = True
    ) -> list[Row]:
        """Rows of a method; without `chooses` only what does not go by the experts' scores."""
        plan = self.plan
        role: RowRole = "ours" if method.name == OURS else "peer"
        seeds = tuple(range(plan.seeds)) if method.draws else (0,)
        rows = []
        if role == "ours" or not plan.tuned:
            name = method.name + UNTUNED
            rows = [self._test_row(name, role, method.name, method.untuned, seeds)]
            if (recipe := self.making.recipe(method, method.untuned)) is not None:
                self.chosen[name] = recipe
            if not plan.tuned:
                return rows
        before = len(self.wanted or ())
        if under := method.on_top_of:
            if under not in won:
                if under not in self.waiting:
                    self._method_rows(peers(len(plan.experts))[under], won, chooses=chooses)
                if under in self.waiting:
                    return rows
                won.setdefault(under, peers(len(plan.experts))[under].untuned)
            if method.aim:
                method = with_aim(method, won[under])
        found: dict[str, Trial] = {}

        def value(setting: Setting) -> float | None:
            """The objective on validation items, None where it failed."""
            if (known := found.get(repr(setting))) is not None:
                return known.value
            self._measure(method.name, setting, 0, "valid")
            scores = self._scores(method.name, setting, 0, "valid")
            if scores is None:
                return None
            reached = select.objective(scores, self.ceiling.get("valid"))
            found[repr(setting)] = Trial(setting, reached, self._perplexity(method.name, setting))
            return reached

        if method.searched and self.wanted is not None:
            return rows  # each try depends on the one before: this process makes them
        if method.searched:
            keys = weights_of(len(plan.experts))
            start = dict.fromkeys(keys, won[TASK_ARITHMETIC]["weight"])
            select.coordinate_search(start, [float(s["weight"]) for s in method.grid], value)
        else:
            for setting in method.grid:
                value(setting)
        if self._waits(before) or not chooses:
            self.waiting.add(method.name)
            return rows
        if not found:
            return [Row(method.name, role, failed="no setting of its grid was evaluated"), *rows]
        trials = tuple(found.values())

        def tested(trial: Trial) -> Row:
            name, setting = method.name, trial.setting
            return self._test_row(name, role, name, setting, seeds, trial.value)

        self._again[method.name] = tested
        best = select.best(trials)
        won[method.name] = best.setting
        tuned = tested(best)
        if (recipe := self.making.recipe(method, best.setting)) is not None:
            self.chosen[method.name] = recipe
        return [replace(tuned, trials=trials), *rows]

    def _perplexity(self, model: str, setting: Setting) -> float | None:
        """Of plain text, times the base's, None where it was not measured."""
        return perplexity(self._kept(model, setting, (0,)), self._kept("base", {}, (0,)))

    def _recipe_row(self, name: str, recipe: MergeConfiguration) -> Row:
        """A further recipe, as it is written."""
        role: RowRole = "ours" if recipe.merge_method == OURS else "peer"
        self.chosen[name] = recipe
        return self._test_row(name, role, name, {}, (0,))

    def _test_row(
        self,
        name: str,
        role: RowRole,
        model: str,
        setting: Setting,
        seeds: Sequence[int],
        valid: float | None = None,
    ) -> Row:
        for seed in seeds:
            self._measure(model, setting, seed, "test")
        return self._row(name, role, model, setting, seeds, valid)

    def _row(
        self,
        name: str,
        role: RowRole,
        model: str,
        setting: Setting,
        seeds: Sequence[int],
        valid: float | None,
    ) -> Row:
        by_seed = [self._scores(model, setting, seed, "test") for seed in seeds]
        reasons = [
            self.results.failed[job]
            for seed in seeds
            for job in [Job.of(model, setting, seed, t, "test") for t in self._task_names]
            if job in self.results.failed
        ]
        if reasons:
            return Row(name, role, setting, valid=valid, failed=reasons[0])
        scores = {t: [s[t] for s in by_seed if s is not None] for t in self._task_names}
        known = [self.results.cost(model, setting, seed) for seed in seeds]
        costs = [cost for cost in known if cost is not None]
        dearest = max(costs, key=lambda cost: cost.seconds or 0, default=None)
        kept = self._kept(model, setting, seeds)
        return Row(name, role, setting, scores, valid, cost=dearest, kept=kept)

    def _kept(self, model: str, setting: Setting, seeds: Sequence[int]) -> dict[str, float]:
        """Means over seeds and items of what should not be forgotten, as far as it was measured."""
        found = {}
        for task in self.plan.keep:
            jobs = [Job.of(model, setting, seed, task.name, "test") for seed in seeds]
            scores = [s for job in jobs for s in self.results.scores(job) or ()]
            if scores:
                found[task.name] = select.mean(scores)
        return found

    def _scores(
        self, model: str, setting: Setting, seed: int, split: Split
    ) -> dict[str, list[float]] | None:
        """Scores by task, None unless every task has them."""
        found = {}
        for task in self._task_names:
            scores = self.results.scores(Job.of(model, setting, seed, task, split))
            if scores is None:
                return None
            found[task] = scores
        return found

    def _measure(self, model: str, setting: Setting, seed: int, split: Split) -> None:
        """Evaluate one model on the tasks that are not done yet; record how merges fail."""
        asked: list[tuple[Task, Split]] = [(task, split) for task in self.plan.tasks]
        # texts have no validation items: of every setting they are measured as they are
        asked += [
            (task, "test") for task in (self.plan.keep if split == "test" else self.plan.texts)
        ]
        todo: list[tuple[Task, Job]] = []
        done: list[Job] = []
        for task, items in asked:
            job = Job.of(model, setting, seed, task.name, items)
            self.results.drop_incomplete(job, task.count(items))
            if self.results.scores(job) is None and job not in self.results.failed:
                todo.append((task, job))
            else:
                done.append(job)
        if self.wanted is not None:
            self.wanted += [tuple(job for _, job in todo)] if todo else []
            return
        self.order += [*done, *(job for _, job in todo)]
        self.progress.advance(len([job for job in done if job not in self.spread]), resumed=True)
        self.spread.difference_update(done)  # they are counted
        if todo:
            first = todo[0][1]
            kept = Kept(self.results, self.progress, first)
            evaluate(partial(self.making.of_job, first), todo, self.at_once, kept)
