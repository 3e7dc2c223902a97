"""What a comparison hands from its parts to each other: results by item, and rows of the table."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from mergekit_wp.terms import RowRole, Split

#: a method's parameters, e.g. ``{"density": 0.5, "lambda": 1.0}``
Setting = dict[str, float | int | str | bool]


#: what a row's name ends with when its parameters were not chosen on validation items
UNTUNED = " (untuned)"
#: and where they were chosen among those that leave plain text as good as the reference does
EQUAL = " (at equal perplexity)"

#: parameters of which 1 is all there is
SHARES = frozenset({"density", "off_diagonal", "select_topk", "sparsity"})


def recipe_name(row: str) -> str:
    """The file name, without its ending, under which a row's recipe is kept."""
    return row.replace(UNTUNED, "-untuned").replace(" ", "-")


def since(begun: float) -> float | None:
    """Seconds; None where a run is to be the same to the last byte whenever it is made."""
    return None if "SOURCE_DATE_EPOCH" in os.environ else perf_counter() - begun


class Cost(BaseModel):
    """What one merge took, its evaluation left out.

    Attributes:
        prompts: of all experts together that it was made with; 0 for a merge without data.
        gradient_steps: steps of an optimiser that followed gradients through a whole model.
        forward_passes: sequences that went through a whole model, with gradients or without; the
            experts' own answers, which every method with data needs alike, are not among them.
            None where none did, or where the merge goes by scores of single experts.
        seconds: of the clock on the wall; None where the merge goes by scores from elsewhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompts: int = 0
    gradient_steps: int = 0
    forward_passes: int | None = None
    seconds: float | None = None


class CostLine(BaseModel):
    """One line of ``costs.jsonl``: what one merge took; of two lines of one merge the later."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    setting: Setting = {}
    seed: int = 0
    cost: Cost


class ResultLine(BaseModel):
    """One line of ``results.jsonl``: one model on one item, or why it has no score."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: "base", "expert NAME", a method's name, or a recipe's
    model: str
    setting: Setting = {}
    #: seed of methods that draw (DARE, DELLA); 0 elsewhere
    seed: int = 0
    task: str
    split: Split
    item: str | None = None
    score: float | None = None
    output: str | None = None
    #: a right answer that had not ended at its last token, and counts as wrong
    cut: bool = False
    #: set instead of item and score when the merge or its evaluation failed
    failed: str | None = None

    @model_validator(mode="after")
    def _scored_or_failed(self) -> Self:
        if (self.item is None or self.score is None) == (self.failed is None):
            raise ValueError("a line has an item and its score, or says why it has none")
        return self

    @property
    def known(self) -> float:
        """The score of an item that has one."""
        assert self.score is not None
        return self.score


@dataclass(frozen=True)
class Trial:
    """One setting of a method on the validation items.

    Attributes:
        setting: its parameters.
        value: mean over tasks, what parameters are chosen by.
        perplexity: of plain text, times the base's; None where no text is measured.
    """

    setting: Setting
    value: float
    perplexity: float | None = None


def perplexity(own: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """Of plain text, times the base's: the geometric mean over texts, None without any.

    Args:
        own: mean scores by task; those of texts are nats a token, below 0.
        base: the base's.
    """
    texts = [text for text, score in base.items() if score < 0 and text in own]
    if not texts:
        return None
    return math.exp(sum(base[text] - own[text] for text in texts) / len(texts))


@dataclass(frozen=True)
class Row:
    """One row of the comparison: a model on the test items.

    Attributes:
        name: "ties", "weight_patching (untuned)", "expert inst", "base", a recipe's name.
        role: what it is.
        setting: the parameters it was merged with.
        scores: by task, ``[seeds][items]``; the items of a task are the same for every row.
        valid: mean over tasks on the validation items, None for untuned rows.
        failed: why there are no scores.
        cost: of the merge, the dearest of its seeds; None where nothing is merged.
        trials: every setting that was evaluated on the validation items.
        kept: mean score on each task that a merge should not forget; of texts nats a token, < 0.
    """

    name: str
    role: RowRole
    setting: Setting = field(default_factory=dict)
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    valid: float | None = None
    failed: str | None = None
    cost: Cost | None = field(default=None, compare=False)  # another run takes other seconds
    trials: tuple[Trial, ...] = ()
    kept: dict[str, float] = field(default_factory=dict)

    @property
    def measured_as(self) -> str:
        """What its lines of results call it: a method has one name, tuned and untuned."""
        return self.name.removesuffix(UNTUNED)

    @property
    def tried(self) -> int:
        """How many settings were evaluated on the validation items."""
        return len(self.trials)

    @property
    def at_an_end(self) -> tuple[str, ...]:
        """Numbers among its parameters of which none higher, or none lower, was tried.

        Nothing, and of a share all, is an end of the parameter itself: nothing lies beyond it.
        """
        found = []
        for key, chosen in self.setting.items():
            values = {trial.setting.get(key) for trial in self.trials}
            numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
            if chosen == 0 or (key in SHARES and chosen == 1):
                continue
            if len(numbers) > 1 and chosen in (min(numbers), max(numbers)):
                found.append(key)
        return tuple(found)

    def perplexity(self, base: Row) -> float | None:
        """Of plain text, times the base's: the geometric mean over texts, None without any."""
        return perplexity(self.kept, base.kept)

    def losses(self, base: Row) -> dict[str, float]:
        """What part of the base's score is lost, by task; below 0 where something is gained.

        Of texts 1 - (perplexity of the base / perplexity here). A task at which the base gets
        nothing right has nothing to lose.
        """
        found = {}
        for task, own in self.kept.items():
            before = base.kept.get(task, 0.0)
            if before < 0:
                found[task] = 1 - math.exp(own - before)
            elif before > 0:
                found[task] = 1 - own / before
        return found


def reference_of(rows: Sequence[Row]) -> str:
    """The row that differences are from: our first one that has scores, else any."""
    measured = [row for row in rows if row.failed is None]
    return next((row for row in measured if row.role == "ours"), measured[0]).name


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison, ours first among equals.

    Attributes:
        rows: base, experts, peers and ours.
        tasks: names, in the order asked for.
        relative: whether a task's score is divided by its best expert's.
        reference: name of the row that the others are compared with.
        bound: of the perplexity in `equal`, times the base's; None where no text was measured.
        equal: by the name of a row, the same method with the best of its parameters that leave
            plain text within ``bound``; without those of which none does.
        warnings: why numbers on some test items say less than others.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    relative: bool
    reference: str
    bound: float | None = None
    equal: Mapping[str, Row] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> Row | None:
        """The base's row."""
        return next((row for row in self.rows if row.role == "base"), None)


@dataclass(frozen=True)
class SampleItem:
    """One test item on which the merges differ, with everybody's answer.

    Attributes:
        task: which it is of.
        question: what was asked.
        answers: of each row by name: what was generated, and its score.
    """

    task: str
    question: str
    answers: dict[str, tuple[str, float]]
