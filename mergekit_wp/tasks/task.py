"""What a model is measured on: items with validation and test kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.terms import Split


@dataclass(frozen=True)
class ItemScore:
    """One item's outcome.

    Attributes:
        item: which.
        score: in [0, 1], or a task's own unit.
        output: what was generated.
        cut: it would be right, but had not ended at its last token, and counts as wrong.
    """

    item: str
    score: float
    output: str | None = None
    cut: bool = False


class Task(Protocol):
    """Something a merged model is measured on, with validation and test items kept apart."""

    @property
    def name(self) -> str:
        """The task's name in tables."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which items there are and how they are scored."""

    def count(self, split: Split) -> int:
        """Items of a split; 0 where the task has none."""

    def question(self, item: str) -> str:
        """What a test item asks, by the name that its `ItemScore` has."""

    def too_long(self, model: Any, tokenizer: Any) -> str | None:
        """What to say of items longer than a model was made for, None where none is.

        Raises:
            UserError: the model has no positions for one.
        """

    def evaluate(
        self,
        model: Any,
        asked: TextInterface,
        split: Split,
        at_once: AtOnce | None = None,
    ) -> list[ItemScore]:
        """Every item's score, in a fixed order with fixed names.

        Args:
            model: a transformers causal LM in eval mode.
            asked: how it is asked.
            split: which items.
            at_once: no more sequences go through the model together, and fewer where memory runs
                out; with None running out is an error.
        """
