"""From how tasks are written to tasks: items of sources by their names, the rest from lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_wp.prompts.location import ENDINGS, Location
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.plain_text import PlainText
from mergekit_wp.tasks.skill import Skill
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import Split


@dataclass(frozen=True)
class Loading:
    """How tasks are read, and how their items are asked.

    Attributes:
        checkers: the built-in ones, and those of a user's file.
        max_new_tokens: of an answer to an item that says none.
        batch_size: sequences at once; None for a size that fits the device.
    """

    checkers: Checkers
    max_new_tokens: int
    batch_size: int | None

    def load(
        self, specs: Sequence[str], usual: Split | None = None, texts: bool = False
    ) -> tuple[Task, ...]:
        """The tasks in order; those that are given one name are one task, where its first stands.

        Args:
            specs: ``SOURCE``, ``NAME=SOURCE``, or a task of lm-eval by name or YAML file.
            usual: split of items that do not say theirs; None where they have to.
            texts: .txt files are plain text, not items.

        Raises:
            UserError: no such task, or a file that cannot be used.
        """
        parts: dict[str | int, list[Task]] = {}
        for number, spec in enumerate(specs):
            name, place = parted(spec)
            task = self._one(name, place, usual, texts)
            parts.setdefault(number if name is None else name, []).append(task)
        return tuple(_together(name, found) for name, found in parts.items())

    def _one(self, name: str | None, place: str, usual: Split | None, texts: bool) -> Task:
        if texts and Path(place).suffix == ".txt":
            return PlainText.read(Path(place), name)
        if _of_harness(place):
            from mergekit_wp.tasks.lm_eval import LmEvalTask

            return LmEvalTask.load(place, self.batch_size)
        return JsonlTask.read(
            Path(place),
            self.checkers,
            name=name,
            usual=usual,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )


def parted(spec: str) -> tuple[str | None, str]:
    """NAME=SOURCE parted: a source has its own equals signs behind a question mark only."""
    name, equals, place = spec.partition("=")
    return (name, place) if equals and "?" not in name else (None, spec)


def _together(name: str | int, parts: Sequence[Task]) -> Task:
    if isinstance(name, int) or (len(parts) == 1 and parts[0].name == name):
        return parts[0]
    return Skill(name, tuple(parts), tuple(parts))


def _of_harness(place: str) -> bool:
    """Whether it is a task of lm-eval: its YAML file, or a name that is none of a file."""
    source = Location.parse(place)
    if source.kind != "file":
        return source.kind == "harness"
    return not source.place.lower().endswith(ENDINGS) and not Path(source.place).exists()
