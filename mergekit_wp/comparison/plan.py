"""What a comparison compares on what, checked before the first merge.

Test items that were seen before, in validation or in prompts that something was made with, are a
warning: what is measured on them says little of others. Items of lm-eval are not looked at: their
prompts are made of documents, and nothing tells whether a prompt is of the same document.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from mergekit.config import MergeConfiguration

from mergekit_wp.comparison.methods import Method
from mergekit_wp.errors import UserError, option
from mergekit_wp.files import scorefile
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.models.hub import local_path
from mergekit_wp.prompts import Prompt, PromptSource, read_prompts, text_digest
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.plain_text import PlainText
from mergekit_wp.tasks.skill import Skill
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import Split

_WAY_OUT = "what is measured on them says little of others: leave them out of one of the two"


@dataclass(frozen=True)
class Plan:
    """What is compared on what.

    Attributes:
        base, experts: model references; `names` of the experts in tables.
        recipe: ours as the user wrote it, None to compare peers only.
        extra: further fixed recipes by name.
        methods: what to merge by.
        tasks: what to measure on.
        keep: what a merge should not forget; the best parameters are not chosen by it.
        dtype: of the peers' merges.
        device: that merges and evaluates.
        eval_dtype: of weights and activations while evaluating.
        tuned: whether to choose settings on validation items too.
        relative: whether a task counts relative to its best expert.
        seeds: draws of methods that draw.
        calibration: prompts for AIM.
        prompts: each expert's, by its name, for methods that learn from them.
        max_new_tokens: of the answers that experts give to these prompts.
        warnings: why numbers on some test items say less than others.
    """

    base: str
    experts: tuple[str, ...]
    names: tuple[str, ...]
    recipe: MergeConfiguration | None
    extra: Mapping[str, MergeConfiguration]
    methods: tuple[Method, ...]
    tasks: tuple[Task, ...]
    dtype: str
    device: str
    eval_dtype: torch.dtype
    keep: tuple[Task, ...] = ()
    tuned: bool = True
    relative: bool = False
    seeds: int = 1
    calibration: tuple[Prompt, ...] = ()
    prompts: tuple[tuple[str, PromptSource], ...] = ()
    max_new_tokens: int = 64
    in_memory: bool | None = None
    warnings: tuple[str, ...] = ()

    @property
    def texts(self) -> list[PlainText]:
        """What is measured of every setting, beside the validation items."""
        return [task for task in self.keep if isinstance(task, PlainText)]

    def check(self) -> None:
        """Refuse what would fail after hours.

        Raises:
            UserError: a task without items that are needed; AIM without calibration prompts, or a
                method that learns without prompts.
        """
        names = [task.name for task in (*self.tasks, *self.keep)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two tasks are called '{twice[0]}'; name them: NAME=FILE.jsonl")
        wanted: tuple[Split, ...] = ("valid", "test") if self.tuned else ("test",)
        for task in self.tasks:
            for split in wanted:
                if not task.count(split):
                    why = {
                        "valid": "parameters are chosen on them; mark some items as such, or "
                        f"compare with {option('untuned', True)}",
                        "test": "they are what is reported",
                    }[split]
                    raise UserError(f"task '{task.name}' has no '{split}' items: {why}")
        if without := [task.name for task in self.keep if not task.count("test")]:
            raise UserError(
                f"{option('keep', without[0])} has no 'test' items: nothing is chosen by what is "
                "kept, so mark its items as such"
            )
        if any(method.aim for method in self.methods) and not self.calibration:
            raise UserError(f"AIM needs {option('calibration', 'PROMPTS.jsonl')}")
        learning = [method.name for method in self.methods if method.needs_prompts]
        if learning and not self.prompts:
            raise UserError(
                f"method '{learning[0]}' learns from the experts' prompts; give those of each: "
                f"{option('prompts', f'{self.names[0]}=FILE.jsonl')}"
            )


def overlaps(plan: Plan) -> Iterator[str]:
    """One warning for every task and source of prompts that have items in common.

    Raises:
        UserError: a score file or prompts that cannot be read.
    """
    asked = {task.name: _digests(task, "test") for task in (*plan.tasks, *plan.keep)}
    for task in plan.tasks if plan.tuned else ():
        if both := _both(asked[task.name], _digests(task, "valid")):
            yield (
                f"warning: {both} test items of task '{task.name}' are validation items as well; "
                f"{_WAY_OUT}"
            )
    for what, seen in _seen(plan):
        for name, items in asked.items():
            if both := _both(items, seen):
                yield (
                    f"warning: {both} test items of task '{name}' are among the prompts {what}; "
                    f"{_WAY_OUT}"
                )


def _digests(task: Task, split: Split) -> list[str]:
    """Of the items of a split; none of tasks whose items are not prompts."""
    if isinstance(task, Skill):
        return [digest for part in task.of(split) for digest in _digests(part, split)]
    if isinstance(task, JsonlTask):
        return [text_digest(item["prompt"]) for item in task.of(split)]
    return []


def _both(items: Collection[str], seen: Collection[str]) -> str:
    """How many of some items were seen, "" where none was."""
    known = set(seen)
    count = sum(item in known for item in items)
    return f"{count} of {len(items)}" if count else ""


def _seen(plan: Plan) -> Iterator[tuple[str, Collection[str]]]:
    """Sources of prompts, as a warning calls them, and the digests of their prompts."""
    configs = [config for config in (plan.recipe, *plan.extra.values()) if config is not None]
    paths = [path for config in configs for path in recipes.score_texts(data_of(config))]
    guards: dict[str, Collection[str]] = {}  # the same in the files of all experts of a fit
    for path in dict.fromkeys(paths):
        manifest = scorefile.read(local_path(path)).manifest
        yield (
            f"that the scores of '{manifest.behavior}' were made with",
            manifest.prompt_digests or (),
        )
        for guard in manifest.fit.guards if manifest.fit else ():
            guards[guard.behavior] = guard.prompt_digests or ()
    for name, digests in guards.items():
        yield f"of guard {name}", digests
    # experts without scores are still to be fitted on these
    used = not paths or any(method.needs_prompts for method in plan.methods)
    for name, source in plan.prompts if used else ():
        yield f"of {name}", read_prompts(source, None, name).digests
    if plan.calibration and any(method.aim for method in plan.methods):
        calibration = [text_digest(prompt.prompt) for prompt in plan.calibration]
        yield "for calibration", calibration
