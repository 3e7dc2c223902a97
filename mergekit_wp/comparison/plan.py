"""What a comparison compares on what, checked before the first merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mergekit.config import MergeConfiguration

from mergekit_wp.comparison.methods import Method
from mergekit_wp.errors import UserError, option
from mergekit_wp.prompts import Prompt, PromptSource
from mergekit_wp.tasks.plain_text import PlainText
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import Split


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
