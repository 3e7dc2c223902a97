"""Run a comparison: merge, evaluate, choose on validation items, report on test items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_wp.comparison import select
from mergekit_wp.comparison.failures import MAY_FAIL, why_failed
from mergekit_wp.comparison.merging import (
    IN_MEMORY,
    EvaluationModel,
    keeps_shapes,
    merge_in_memory,
    merged_on_disk,
)
from mergekit_wp.comparison.methods import OMEGA, OURS, Method, configuration, peers, with_aim
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import Job, Results
from mergekit_wp.comparison.rows import UNTUNED, Comparison, Row, Setting
from mergekit_wp.errors import UserError
from mergekit_wp.interrupts import finishing
from mergekit_wp.merging.aim import activation_importance, apply_aim
from mergekit_wp.merging.interface import write_beside
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.generation import TextInterface, read_tokenizer
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.memory import UNBOUNDED, AtOnce, is_out_of_memory
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.texts import find_tokenizer
from mergekit_wp.terms import RowRole, Split

#: a model in memory and how it is asked, while the context lasts
Ready: TypeAlias = AbstractContextManager[tuple[Any, TextInterface]]


@dataclass
class Runner:
    """One comparison under way.

    Attributes:
        plan: what is compared.
        results: finished jobs.
        progress: told of every job, and of every step back where memory runs out.
    """

    plan: Plan
    results: Results
    progress: Progress
    _tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    chosen: dict[str, MergeConfiguration] = field(default_factory=dict)

    def run(self) -> Comparison:
        """Everything, in the order of the table."""
        plan = self.plan
        # what fitted one model fits the next, but another task may have longer prompts
        self.at_once = {task.name: AtOnce(UNBOUNDED, self.progress.note) for task in plan.tasks}
        self.base = Checkpoint(plan.base)
        self.evaluation = EvaluationModel(self.base, plan.eval_dtype, plan.device)
        self.tokenizer = find_tokenizer(
            map(Checkpoint, (plan.base, *plan.experts)), self.progress.note
        )
        for task in plan.tasks:
            if note := task.too_long(self.evaluation.model, self.tokenizer):
                self.progress.note(note)
        self.in_memory = plan.in_memory
        if self.in_memory is None:
            parameters = sum(p.numel() for p in self.evaluation.model.parameters())
            self.in_memory = 4 * parameters <= IN_MEMORY
        splits: tuple[Split, ...] = ("valid", "test") if plan.tuned else ("test",)
        self.progress.stage("comparing", self._count_jobs(len(splits)), "job")
        rows = [self._checkpoint_row("base", "base", self.base, splits)]
        for name, reference in zip(plan.names, plan.experts, strict=True):
            expert = Checkpoint(reference)
            rows.append(self._checkpoint_row(f"expert {name}", "expert", expert, splits))
        self.ceiling: dict[str, dict[str, float]] = {}
        if plan.relative:
            for split in splits:
                experts = [self._scores(f"expert {n}", {}, 0, split) for n in plan.names]
                known = [scores for scores in experts if scores is not None]
                self.ceiling[split] = select.ceilings(known, self._task_names, split)
        won: dict[str, Setting] = {}
        for method in plan.methods:
            rows += self._method_rows(method, won)
        for name, config in plan.extra.items():
            role: RowRole = "ours" if config.merge_method == OURS else "peer"
            rows.append(self._test_row(name, role, name, {}, (0,), partial(_fixed, config)))
        ours_named = [row.name for row in rows if row.role == "ours"]
        measured = [row.name for row in rows if row.failed is None]
        if not measured:
            raise UserError(
                f"nothing could be compared, for every model failed; {rows[0].name}: "
                f"{rows[0].failed}"
            )
        # differences are from a row that has scores
        reference = next((name for name in ours_named if name in measured), measured[0])
        return Comparison(tuple(rows), tuple(self._task_names), plan.relative, reference)

    @property
    def _task_names(self) -> list[str]:
        return [task.name for task in self.plan.tasks]

    def _count_jobs(self, n_splits: int) -> int:
        plan, models = self.plan, n_splits * (1 + len(self.plan.experts)) + len(self.plan.extra)
        for method in plan.methods:
            draws = plan.seeds if method.draws else 1
            models += draws * (2 if plan.tuned and method.name == OURS else 1)
            models += (len(method.grid) or 3) if plan.tuned else 0
        return models * len(plan.tasks)

    def _checkpoint_row(
        self, name: str, role: RowRole, checkpoint: Checkpoint, splits: Sequence[Split]
    ) -> Row:
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            if role == "expert":
                self.progress.note(
                    f"'{checkpoint.name}' has no tokenizer; that of the merges is used"
                )
            tokenizer = self.tokenizer
        asked = TextInterface.of(checkpoint.path, tokenizer)

        def load() -> Ready:
            return nullcontext((self.evaluation.load_checkpoint(checkpoint), asked))

        for split in splits:
            self._measure(name, {}, 0, split, load)
        return self._row(name, role, name, {}, (0,), None)

    def _method_rows(self, method: Method, won: dict[str, Setting]) -> list[Row]:
        plan = self.plan
        role: RowRole = "ours" if method.name == OURS else "peer"

        def make(setting: Setting) -> MergeConfiguration:
            return configuration(method, setting, plan.base, plan.experts, plan.dtype, plan.recipe)

        seeds = tuple(range(plan.seeds)) if method.draws else (0,)
        rows = []
        if role == "ours" or not plan.tuned:
            name = method.name + UNTUNED
            rows = [self._test_row(name, role, method.name, method.untuned, seeds, make)]
        if not plan.tuned:
            return rows
        if method.aim:
            under = method.name.removesuffix("+aim")
            if under not in won:
                self._method_rows(peers(len(plan.experts))[under], won)
                won.setdefault(under, method.untuned)
            method = with_aim(method, won[under])
        found = []
        for setting in method.grid:
            self._measure(method.name, setting, 0, "valid", partial(self._merge, setting, 0, make))
            scores = self._scores(method.name, setting, 0, "valid")
            if scores is not None:
                found.append((setting, select.objective(scores, self.ceiling.get("valid"))))
        if not found:
            return [Row(method.name, role, failed="no setting of its grid was evaluated"), *rows]
        setting, valid = select.best(found)
        won[method.name] = setting
        tuned = self._test_row(method.name, role, method.name, setting, seeds, make, valid)
        return [tuned, *rows]

    def _test_row(
        self,
        name: str,
        role: RowRole,
        model: str,
        setting: Setting,
        seeds: Sequence[int],
        make: Callable[[Setting], MergeConfiguration],
        valid: float | None = None,
    ) -> Row:
        for seed in seeds:
            self._measure(model, setting, seed, "test", partial(self._merge, setting, seed, make))
        self.chosen[name] = make(setting)
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
        return Row(name, role, setting, scores, valid)

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

    def _measure(
        self,
        model: str,
        setting: Setting,
        seed: int,
        split: Split,
        load: Callable[[], Ready],
    ) -> None:
        """Evaluate one model on the tasks that are not done yet; record how merges fail."""
        todo = []
        for task in self.plan.tasks:
            job = Job.of(model, setting, seed, task.name, split)
            self.results.drop_incomplete(job, task.count(split))
            if self.results.scores(job) is None and job not in self.results.failed:
                todo.append((task, job))
        self.progress.advance(len(self.plan.tasks) - len(todo), resumed=True)
        if not todo:
            return
        try:
            with load() as (ready, asked):
                for task, job in todo:
                    try:
                        with finishing():
                            found = task.evaluate(ready, asked, split, self.at_once[task.name])
                            self.results.add(job, found)
                    except MAY_FAIL as error:
                        self._record_failure(error, [job])
                    else:
                        self.progress.advance(1)
        except MAY_FAIL as error:
            self._record_failure(error, [job for _, job in todo])

    def _record_failure(self, error: Exception, jobs: Sequence[Job]) -> None:
        """Record why jobs have no scores, or raise what is not the merge's fault."""
        reason = why_failed(error)
        if reason is None:
            raise error
        for job in jobs:
            if job not in self.results.done and job not in self.results.failed:
                self.results.add_failure(job, reason)
                self.progress.advance(1)

    def _options(self, seed: int) -> MergeOptions:
        return MergeOptions(quiet=True, random_seed=seed, device=self.plan.device)

    @contextmanager
    def _merge(
        self, setting: Setting, seed: int, make: Callable[[Setting], MergeConfiguration]
    ) -> Iterator[tuple[Any, TextInterface]]:
        config = make(setting)
        if OMEGA not in setting and not (self.in_memory and keeps_shapes(config)):
            with _on_disk(self, config, seed) as found:
                yield found
            return
        tensors = merge_in_memory(config, self._options(seed))
        with TemporaryDirectory() as beside:
            write_beside(config, self._options(seed), Path(beside))
            asked = self.interface_of(Path(beside))
        yield self.evaluation.load(self._with_aim(setting, tensors)), asked

    def interface_of(self, folder: Path) -> TextInterface:
        """How the merge in a folder is asked; where mergekit copied no tokenizer as the base is."""
        return TextInterface.of(folder, read_tokenizer([folder], "the merge") or self.tokenizer)

    def _with_aim(
        self, setting: Setting, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if OMEGA not in setting:
            return tensors
        if "base" not in self._tensors:
            model = self.evaluation.load_checkpoint(self.base)
            texts = self.plan.calibration
            self._tensors["importance"] = AtOnce(16, self.progress.note).run(
                lambda size: activation_importance(model, self.tokenizer, texts, size), len(texts)
            )
            self._tensors["base"] = {
                n: self.base.tensor(n, torch.float32) for n in self.evaluation.names
            }
        return apply_aim(
            self._tensors["base"], tensors, self._tensors["importance"], float(setting[OMEGA])
        )


@contextmanager
def _on_disk(
    runner: Runner, config: MergeConfiguration, seed: int
) -> Iterator[tuple[Any, TextInterface]]:
    """A merge in a folder of its own while it is evaluated."""
    plan = runner.plan
    with merged_on_disk(config, runner._options(seed), runner.results.folder) as folder:
        try:
            model = load_folder(folder, plan.eval_dtype, plan.device)
        except (ValueError, RuntimeError) as error:  # by transformers
            if is_out_of_memory(error):
                raise
            raise UserError(f"the merge cannot be loaded: {error}") from error
        yield model, runner.interface_of(folder)


def _fixed(config: MergeConfiguration, _setting: Setting) -> MergeConfiguration:
    return config
