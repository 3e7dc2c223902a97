"""What it takes to ask a model the items of a task."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.costs.passes import TextBatch, answers, forward
from mergekit_wp.costs.work import NOTHING, Work
from mergekit_wp.models.encoding import encode_prompt
from mergekit_wp.tasks.items import AT_ONCE, JsonlTask
from mergekit_wp.tasks.lm_eval import HARNESS_TOKENS, LmEvalTask
from mergekit_wp.tasks.plain_text import WINDOW, PlainText
from mergekit_wp.tasks.skill import Skill
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import Split

#: tokens that a document of lm-eval is taken to have, which only the harness knows, and choices
DOCUMENT, CHOICES = 256, 4


class Asking(NamedTuple):
    """One model asked all items of a split.

    Attributes:
        work: that it takes.
        answers: how many it writes.
        guessed: whether lengths had to be guessed.
    """

    work: Work = NOTHING
    answers: int = 0
    guessed: bool = False

    def and_then(self, other: Asking) -> Asking:
        """Both."""
        return Asking(
            self.work + other.work, self.answers + other.answers, self.guessed or other.guessed
        )


def asked(size: ModelSize, task: Task, split: Split, tokenizer: Any, device: str) -> Asking:
    """What the items of a split take.

    Args:
        size: of the model that is asked.
        task: of any kind.
        split: of its items.
        tokenizer: the model's.
        device: that computes.
    """
    if isinstance(task, Skill):
        found = Asking()
        for part in task.of(split):
            found = found.and_then(asked(size, part, split, tokenizer, device))
        return found
    if isinstance(task, PlainText):
        return Asking(_read(size, task, tokenizer) if split == "test" else NOTHING)
    if isinstance(task, JsonlTask):
        return _items(size, task, split, tokenizer, device)
    count = task.count(split)
    kind = task.task.OUTPUT_TYPE if isinstance(task, LmEvalTask) else "generate_until"
    if kind == "generate_until":
        stated = getattr(getattr(task, "task", None), "config", None)
        longest = (getattr(stated, "generation_kwargs", None) or {}).get("max_gen_toks")
        work = answers(size, (DOCUMENT,) * count, int(longest or HARNESS_TOKENS), 8)
        return Asking(work, count, True)
    documents = TextBatch(count * CHOICES, DOCUMENT, count * CHOICES)
    return Asking(forward(size, [documents]), 0, True)


def _items(size: ModelSize, task: JsonlTask, split: Split, tokenizer: Any, device: str) -> Asking:
    by_length: dict[int, list[int]] = defaultdict(list)
    for item in task.of(split):
        by_length[task.length(item)].append(len(encode_prompt(tokenizer, item["prompt"])))
    rows, tokens = AT_ONCE["cpu" if device == "cpu" else "cuda"]
    work = NOTHING
    for longest, prompts in by_length.items():
        together = task.batch_size or min(rows, max(1, tokens // (max(prompts) + longest)))
        work = work + answers(size, prompts, longest, together)
    return Asking(work, sum(map(len, by_length.values())))


def _read(size: ModelSize, task: PlainText, tokenizer: Any) -> Work:
    tokens = len(tokenizer(task.text).input_ids)
    windows = max(1, -(-tokens // WINDOW))
    return forward(size, [TextBatch(windows, min(WINDOW, tokens), windows * min(WINDOW, tokens))])
