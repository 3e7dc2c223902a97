"""``results.jsonl``: one line per model and item, appended as each job ends.

A job is one model (a method with its setting and seed, the base, an expert, a recipe) on one split
of one task. A second run skips finished jobs; what a killed run half wrote is dropped. Beside it
``costs.jsonl`` has a line for every merge.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import islice, zip_longest
from pathlib import Path
from statistics import pvariance
from types import TracebackType
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ValidationError

from mergekit_wp.comparison.rows import (
    Comparison,
    Cost,
    CostLine,
    ResultLine,
    SampleItem,
    Setting,
)
from mergekit_wp.errors import DiskError, UserError, option
from mergekit_wp.files.atomic import (
    locked,
    naming_disk,
    refuse_locked,
    refuse_unwritable,
    written_whole,
)
from mergekit_wp.interrupts import Interrupted, unmasked
from mergekit_wp.models.encoding import Clock, today
from mergekit_wp.tasks.task import ItemScore, Task
from mergekit_wp.terms import Split

#: the entry of the hashes of score files, by path
SCORE_FILES = "score files"
#: inputs by name that a later run may add to: results of one do not depend on another
GROWING = ("tasks", "other recipes", "prompts of experts", SCORE_FILES)

#: the entry of the date that a chat template read, where one did
DATE = "template date"

#: items of which the report shows everybody's answers
SAMPLES = 3

#: how folders begin that hold a merge while it is evaluated
MERGE = ".merge."


class Job(NamedTuple):
    """What is measured in one go."""

    model: str
    setting: str
    seed: int
    task: str
    split: Split

    @classmethod
    def of(cls, model: str, setting: Setting, seed: int, task: str, split: Split) -> Job:
        """A job; settings are compared as sorted JSON."""
        return cls(model, json.dumps(setting, sort_keys=True), seed, task, split)

    def line(self, **found: Any) -> ResultLine:
        """A line of results with what was found."""
        return ResultLine(**self._asdict() | {"setting": json.loads(self.setting)}, **found)


class Results:
    """The results of one comparison, on disk and in memory.

    Args:
        folder: where ``results.jsonl`` and ``comparison.json`` are.
        inputs: everything that results depend on beside model, setting and seed, by name. Tasks
            and further recipes may be added to, or left out, by a later run.
        restart: throw away what is there.

    Raises:
        UserError: the folder holds results of other inputs (says which), a damaged file, or
            another run is writing there.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], restart: bool = False) -> None:
        self.folder, self.inputs, self.restart = folder, dict(inputs), restart
        self.path = folder / "results.jsonl"
        self.costs_path = folder / "costs.jsonl"
        self.done: dict[Job, list[ResultLine]] = {}
        self.failed: dict[Job, str] = {}
        #: of merges, by job without task and split
        self.costs: dict[Job, Cost] = {}
        #: what chat templates read for today, of the run that began
        self.clock = Clock(today(), self._write_inputs)

    def __enter__(self) -> Self:
        try:
            with naming_disk(self.folder):
                lock = locked(self.folder / ".lock")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        if lock is None:
            raise UserError(f"another comparison is writing {self.folder}; wait for it")
        self._lock = lock
        try:
            for merge in self.folder.glob(f"{MERGE}*"):  # of a run that was killed
                shutil.rmtree(merge, ignore_errors=True)
            self._check_inputs()
            self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        found = None if error is None else unmasked(error)
        if isinstance(found, DiskError | Interrupted) and self.path.exists():
            found.kept = self.folder
        self._lock.release()
        if found is not None and found is not error:
            raise found from error

    def _check_inputs(self) -> None:
        stated = self.folder / "comparison.json"
        if self.restart:
            self.path.unlink(missing_ok=True)
            self.costs_path.unlink(missing_ok=True)
            stated.unlink(missing_ok=True)
        earlier = _earlier(self.folder, self.inputs)
        if (date := earlier.pop(DATE, None)) is not None:
            self.clock = Clock(str(date), self._write_inputs)
            self.clock.was_read = True
        for key in GROWING:
            if key in earlier and key in self.inputs:
                self.inputs[key] = earlier[key] | self.inputs[key]
        self._write_inputs()

    def _write_inputs(self) -> None:
        stated = self.inputs | ({DATE: self.clock.date} if self.clock.was_read else {})
        with written_whole(self.folder / "comparison.json") as temporary:
            temporary.write_text(json.dumps(stated, indent=1, sort_keys=True))

    def _read(self) -> None:
        """Read finished jobs; drop a torn last line and failures, which are tried again."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes().split(b"\n")
        torn = raw.pop() if raw else b""
        failures = 0
        for number, line in enumerate(raw, start=1):
            try:
                result = ResultLine.model_validate_json(line)
            except ValidationError as error:
                raise _damaged(self.path, number) from error
            if result.failed is not None:
                failures += 1
                continue
            self.done.setdefault(_job_of(result), []).append(result)
        if torn or failures:
            self._rewrite()
        self._read_costs()

    def _read_costs(self) -> None:
        if not self.costs_path.exists():
            return
        *lines, torn = self.costs_path.read_bytes().split(b"\n")
        if torn:
            os.truncate(self.costs_path, self.costs_path.stat().st_size - len(torn))
        for number, line in enumerate(lines, start=1):
            try:
                found = CostLine.model_validate_json(line)
            except ValidationError as error:
                raise _damaged(self.costs_path, number) from error
            self.costs[_merge_of(found.model, found.setting, found.seed)] = found.cost

    def _rewrite(self) -> None:
        with written_whole(self.path) as temporary:
            lines = [line for of_job in self.done.values() for line in of_job]
            temporary.write_text(_text(lines), encoding="utf-8")

    def drop_incomplete(self, job: Job, count: int) -> None:
        """Forget a job that a killed run left with fewer items than the task has."""
        if job in self.done and len(self.done[job]) != count:
            del self.done[job]
            self._rewrite()

    def scores(self, job: Job) -> list[float] | None:
        """The items' scores of a finished job, in the task's order."""
        lines = self.done.get(job)
        return None if lines is None else [line.known for line in lines]

    def samples(self, comparison: Comparison, tasks: Sequence[Task]) -> tuple[SampleItem, ...]:
        """Test items with answers on which the merges' scores differ most, the tasks in turn.

        Args:
            comparison: finished; of a row with several seeds the first one's answers are shown.
            tasks: of the comparison.
        """
        rows = [row for row in comparison.rows if row.failed is None]
        merges = [row.name for row in rows if row.role in ("ours", "peer")]
        by_task: list[list[SampleItem]] = []
        for task in tasks:
            jobs = {r.name: Job.of(r.measured_as, r.setting, 0, task.name, "test") for r in rows}
            lines = {name: self.done[job] for name, job in jobs.items() if job in self.done}
            found = []
            for same in zip(*lines.values(), strict=True):
                told = {
                    name: (line.output, line.known)
                    for name, line in zip(lines, same, strict=True)
                    if line.output is not None
                }
                scores = [score for name, (_, score) in told.items() if name in merges]
                if len(set(scores)) > 1:
                    found.append((pvariance(scores), str(same[0].item), told))
            found.sort(key=lambda one: -one[0])
            by_task.append(
                [
                    SampleItem(task.name, task.question(item), told)
                    for _, item, told in found[:SAMPLES]
                ]
            )
        turns = (one for turn in zip_longest(*by_task) for one in turn if one is not None)
        return tuple(islice(turns, SAMPLES))

    def add(self, job: Job, found: Sequence[ItemScore]) -> None:
        """Append a finished job."""
        lines = [job.line(item=x.item, score=x.score, output=x.output, cut=x.cut) for x in found]
        self._append(self.path, lines)
        self.done[job] = lines
        self.failed.pop(job, None)

    def add_cost(self, model: str, setting: Setting, seed: int, cost: Cost) -> None:
        """Append what a merge took, the first time that it is made."""
        if _merge_of(model, setting, seed) in self.costs:
            return
        line = CostLine(model=model, setting=setting, seed=seed, cost=cost)
        self._append(self.costs_path, [line])
        self.costs[_merge_of(model, setting, seed)] = cost

    def cost(self, model: str, setting: Setting, seed: int) -> Cost | None:
        """What a merge took, None where nobody knows."""
        return self.costs.get(_merge_of(model, setting, seed))

    def add_failure(self, job: Job, reason: str) -> None:
        """Append why a job has no scores."""
        self._append(self.path, [job.line(failed=reason)])
        self.failed[job] = reason

    def settle(self, order: Sequence[Job]) -> None:
        """Write the files anew, in the order in which one process writes them.

        Args:
            order: of this run's jobs; what an earlier one did beside them stays before them.
        """
        ours = dict.fromkeys(order)
        jobs = [job for job in self.done if job not in ours] + list(ours)
        lines = [line for job in jobs for line in self._lines(job)]
        merges = {_merge_of(job.model, json.loads(job.setting), job.seed): None for job in jobs}
        costs = [merge for merge in self.costs if merge not in merges] + [
            merge for merge in merges if merge in self.costs
        ]
        spent = [
            CostLine(model=m.model, setting=json.loads(m.setting), seed=m.seed, cost=self.costs[m])
            for m in costs
        ]
        for path, found in ((self.path, lines), (self.costs_path, spent)):
            if path.exists():
                with written_whole(path) as temporary:
                    temporary.write_text(_text(found), encoding="utf-8")

    def _lines(self, job: Job) -> list[ResultLine]:
        if job in self.failed:
            return [job.line(failed=self.failed[job])]
        return self.done.get(job, [])

    def _append(self, path: Path, lines: Sequence[BaseModel]) -> None:
        text = _text(lines)
        size = path.stat().st_size if path.exists() else 0
        try:
            with naming_disk(path), open(path, "a", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
        except BaseException:
            if path.exists():
                os.truncate(path, size)  # nothing half-written stays
            raise


def _earlier(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of an earlier run in a folder, empty where there was none.

    Raises:
        UserError: they are others, damaged or missing.
    """
    stated = folder / "comparison.json"
    if not stated.exists():
        if (found := folder / "results.jsonl").exists():
            raise UserError(
                f"{found} is there without its comparison.json, so nobody knows what it "
                f"belongs to; choose another {option('out')}, or add {option('restart', True)}"
            )
        return {}
    try:
        earlier = _stated(stated.read_text())
    except ValueError as error:
        raise UserError(
            f"{stated} is damaged; add {option('restart', True)} to begin anew"
        ) from error
    if changed := _changed({k: v for k, v in earlier.items() if k != DATE}, inputs):
        raise UserError(
            f"{folder} holds a comparison with another configuration; changed: "
            f"{', '.join(changed)}; add {option('restart', True)} to begin anew, or "
            f"choose another {option('out')}"
        )
    return earlier


def check_folder(folder: Path, inputs: Callable[[], Mapping[str, Any]] | None) -> None:
    """Refuse what `Results` would, without making or changing any file.

    Args:
        folder: of the results.
        inputs: everything that results depend on; asked only where an earlier run left something.
            None where that will be thrown away.

    Raises:
        UserError: see `Results`; or the folder cannot be written to.
    """
    refuse_unwritable(folder / "results.jsonl", folder)
    refuse_locked(folder / ".lock", f"another comparison is writing {folder}; wait for it")
    if inputs is not None and folder.is_dir():
        left = any((folder / name).exists() for name in ("comparison.json", "results.jsonl"))
        if left:
            _earlier(folder, inputs())


def _text(lines: Sequence[BaseModel]) -> str:
    return "".join(line.model_dump_json(exclude_none=True) + "\n" for line in lines)


def _damaged(path: Path, line: int) -> UserError:
    return UserError(f"{path}, line {line} is damaged; add {option('restart', True)} to begin anew")


def _stated(text: str) -> dict[str, Any]:
    """The inputs of an earlier run.

    Raises:
        ValueError: it does not state them.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected a mapping")
    if any(not isinstance(found[key], dict) for key in GROWING if key in found):
        raise ValueError(f"{' and '.join(GROWING)} are mappings")
    if DATE in found:
        datetime.fromisoformat(str(found[DATE]))
    return found


def _changed(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that earlier results do not belong to."""
    found = []
    for key in sorted({*earlier, *now}):
        old, new = earlier.get(key), now.get(key)
        if key in GROWING:
            old, new = old or {}, new or {}
            # a task is its items with their checkers, and how long an answer may be
            what = " (items, checkers or max_new_tokens)" if key == "tasks" else ""
            names = [name for name in old if name in new and old[name] != new[name]]
            found += [f"{key}: {name}{what}" for name in names]
        elif old != new:
            found.append(key)
    return found


def _merge_of(model: str, setting: Setting, seed: int) -> Job:
    return Job.of(model, setting, seed, "", "test")


def _job_of(line: ResultLine) -> Job:
    return Job.of(line.model, line.setting, line.seed, line.task, line.split)
