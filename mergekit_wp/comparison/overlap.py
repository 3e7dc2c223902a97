"""Which test items were seen before: in validation, or in prompts that something was made with.

What is measured on them says little of others. Items of lm-eval are not looked at: their prompts
are made of documents, and nothing tells whether a prompt is of the same document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from mergekit_wp.comparison.plan import Plan
from mergekit_wp.files import scorefile
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.models.hub import local_path
from mergekit_wp.prompts import read_prompts, text_digest
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.skill import Skill
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import Split

_WAY_OUT = "what is measured on them says little of others: leave them out of one of the two"


def overlaps(plan: Plan) -> Iterator[str]:
    """One warning for every task and source of prompts that have items in common.

    Raises:
        UserError: a score file or prompts that cannot be read.
    """
    asked = {task.name: _digests(task, "test") for task in plan.tasks}
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
    count = Counter(item in set(seen) for item in items)[True]
    return f"{count} of {len(items)}" if count else ""


def _seen(plan: Plan) -> Iterator[tuple[str, Collection[str]]]:
    """Sources of prompts, as a warning calls them, and the digests of their prompts."""
    configs = [config for config in (plan.recipe, *plan.extra.values()) if config is not None]
    paths = [path for config in configs for path in recipes.score_texts(data_of(config))]
    for path in dict.fromkeys(paths):
        manifest = scorefile.read(local_path(path)).manifest
        yield f"that score file {path} was made with", manifest.prompt_digests or ()
    for name, source in plan.prompts:
        yield f"of {name}", read_prompts(source, None, name).digests
    if plan.calibration:
        calibration = [text_digest(prompt.prompt) for prompt in plan.calibration]
        yield "for calibration", calibration
