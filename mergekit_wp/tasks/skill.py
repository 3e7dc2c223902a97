"""Several tasks as one: what a skill is chosen on, and what it is reported on, kept apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.tasks.task import ItemScore, Task
from mergekit_wp.terms import Split


@dataclass(frozen=True)
class Skill:
    """One column of a table, of several tasks; every item counts alike.

    Attributes:
        name: of the skill.
        valid: tasks of whose validation items settings are chosen by.
        test: tasks whose test items are reported.
    """

    name: str
    valid: tuple[Task, ...]
    test: tuple[Task, ...]

    @property
    def fingerprint(self) -> str:
        """Of its parts."""
        parts = [[task.fingerprint for task in self.of(split)] for split in ("valid", "test")]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def said(self) -> str:
        """What was recognised in its sources."""
        notes = [str(getattr(task, "said", "")) for task in self._parts]
        return "; ".join(note for note in notes if note)

    def of(self, split: Split) -> tuple[Task, ...]:
        """The tasks of a split."""
        return self.valid if split == "valid" else self.test

    def count(self, split: Split) -> int:
        """Items of all tasks."""
        return sum(task.count(split) for task in self.of(split))

    def question(self, item: str) -> str:
        """What a test item of one of its tasks asks."""
        number, _, inner = item.partition(":")
        return self.test[int(number) - 1].question(inner)

    def too_long(self, model: Any, tokenizer: Any) -> str | None:
        """What the first task with items that are too long says.

        Raises:
            UserError: the model has no positions for one.
        """
        notes = [task.too_long(model, tokenizer) for task in self._parts]
        return next((note for note in notes if note is not None), None)

    @property
    def _parts(self) -> Sequence[Task]:
        return self.valid if self.valid == self.test else (*self.valid, *self.test)

    def evaluate(
        self,
        model: Any,
        asked: TextInterface,
        split: Split,
        at_once: AtOnce | None = None,
    ) -> list[ItemScore]:
        """The items of all tasks, one task after the other.

        Raises:
            UserError: one of a task's.
            OutOfMemory: there is not even memory for one sequence.
        """
        found = []
        for number, task in enumerate(self.of(split), start=1):
            items = task.evaluate(model, asked, split, at_once)
            found += [replace(item, item=f"{number}:{item.item}") for item in items]
        return found
