"""What a comparison takes: merges, answers, and room on the disk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mergekit.common import dtype_from_name

from mergekit_wp.comparison.compare import CompareOpened
from mergekit_wp.comparison.merging import IN_MEMORY
from mergekit_wp.comparison.methods import OURS, QUICK_METHODS, peers
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.costs import memory
from mergekit_wp.costs.answering import Asking, asked
from mergekit_wp.costs.merging import merged
from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.costs.work import Costs, Held, Stage, Work, total
from mergekit_wp.errors import option
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.memory import in_gib
from mergekit_wp.models.refusals import width
from mergekit_wp.runs.texts import find_tokenizer
from mergekit_wp.tasks.items import AT_ONCE
from mergekit_wp.tasks.plain_text import ROWS, WINDOW, PlainText
from mergekit_wp.terms import Split

#: bytes of a line of results, about
LINE = 400


class MergeCount(NamedTuple):
    """Models that a comparison makes.

    Attributes:
        chosen: to choose settings by, on validation items.
        tested: whose test items are reported.
    """

    chosen: int
    tested: int

    @property
    def every(self) -> int:
        """Both."""
        return self.chosen + self.tested


def merges(plan: Plan) -> MergeCount:
    """How many merges by every method and further recipe; of a search about so many."""
    n = len(plan.experts)
    chosen, tested, names = 0, len(plan.extra), {method.name for method in plan.methods}
    for method in plan.methods:
        draws = plan.seeds if method.draws else 1
        tested += draws * (2 if plan.tuned and method.name == OURS else 1)
        chosen += method.tries(n) if plan.tuned else 0
    if plan.tuned:  # what others go on from is tuned first, and reported by none
        under = {m.on_top_of for m in plan.methods if m.on_top_of} - names
        chosen += sum(peers(n)[name].tries(n) for name in under)
        tested += len(under)
        if plan.texts:  # each but ours once more at equal perplexity, at most
            tested += sum(method.name != OURS for method in plan.methods)
    return MergeCount(chosen, tested)


def comparing(opened: CompareOpened) -> Costs:
    """The whole of `compare`."""
    plan = opened.plan
    checkpoints = [Checkpoint(reference) for reference in (plan.base, *plan.experts)]
    base = checkpoints[0]
    size = ModelSize.of_checkpoint(base)
    tokenizer = find_tokenizer(checkpoints, lambda _: None)
    by_split = {split: _asked(size, plan, split, tokenizer) for split in ("valid", "test")}
    made = merges(plan)
    models = {"valid": len(checkpoints) if plan.tuned else 0, "test": len(checkpoints)}
    asks = {"valid": models["valid"] + made.chosen, "test": models["test"] + made.tested}
    evaluated = total(by_split[split].work * asks[split] for split in asks)
    answers = sum(by_split[split].answers * asks[split] for split in asks)
    stored = [float(sum(_bytes(checkpoint))) for checkpoint in checkpoints]
    in_memory = plan.in_memory
    if in_memory is None:
        in_memory = 4 * size.parameters <= IN_MEMORY
    weights = float(size.parameters * dtype_from_name(plan.dtype).itemsize)
    merge = merged(stored, size.parameters, 0.0 if in_memory else weights)
    reading = Work(read=sum(stored), passed=float(size.parameters))
    files = sum(sum(f.stat().st_size for f in c.weight_files) for c in checkpoints)
    stages = [
        Stage("hashing weights", Work(read=float(files), passed=files / 4)),
        Stage("merging", merge * made.every, f"{made.every} merges"),
        Stage("base and experts", reading * (2 if plan.tuned else 1)),
        Stage("answering", evaluated, f"{answers:,} answers"),
    ]
    adapted = sum(4.0 * size.parameters for c in checkpoints if c.adapter is not None)
    width_ = plan.eval_dtype.itemsize
    held = [
        memory.model(size, width_),
        Held("a merge's tensors", weights if in_memory else 0.0, on_device=False),
        Held("keys, values and logits", _answering(size, width_, plan)),
    ]
    learn = [method.name for method in plan.methods if method.needs_prompts]
    notes = []
    if learn:
        notes.append(f"what {', '.join(learn)} learn from prompts is not counted")
    if any(found.guessed for found in by_split.values()):
        notes.append("documents of lm-eval are taken to be 256 tokens long")
    passing = adapted + (0.0 if in_memory else weights)
    return Costs(
        tuple(stages),
        tuple(held),
        float(LINE * answers),
        passing=passing,
        notes=tuple(notes),
        said=_said(plan, made, answers, float(LINE * answers) + passing),
    )


def _said(plan: Plan, made: MergeCount, answers: int, disk: float) -> str:
    """How much it is, and what would be less."""
    found = f"{made.every} merges, {answers:,} answers, {in_gib(disk)} of disk"
    quick = len(set(QUICK_METHODS)) + len(plan.extra)
    if plan.tuned and made.every > 2 * quick:
        found += f" ({option('quick', True)} makes {quick} merges)"
    return found


def _asked(size: ModelSize, plan: Plan, split: Split, tokenizer: Any) -> Asking:
    found = Asking()
    for task in plan.tasks:
        found = found.and_then(asked(size, task, split, tokenizer, plan.device))
    for task in plan.keep if split == "test" else plan.texts:
        found = found.and_then(asked(size, task, "test", tokenizer, plan.device))
    return found


def _answering(size: ModelSize, width_: int, plan: Plan) -> float:
    """Bytes of keys and values of as many tokens as go together, and of two copies of logits.

    Or of what reading plain text takes, where that is more: the logits of all windows that are read
    together, and two copies of one window's in float32.
    """
    rows, tokens = AT_ONCE["cpu" if plan.device == "cpu" else "cuda"]
    most = max((task.count("test") for task in plan.tasks), default=1)
    rows = min(rows, most)
    kept = 2.0 * size.layers * size.heads * width_ * min(tokens, rows * 256)
    answering = kept + 2.0 * width_ * rows * size.vocabulary
    if not any(isinstance(task, PlainText) for task in plan.keep):
        return answering
    return max(answering, float((ROWS * width_ + 2 * 4) * WINDOW * size.vocabulary))


def _bytes(checkpoint: Checkpoint) -> list[int]:
    return [math.prod(shape) * width(dtype) for shape, dtype in checkpoint.headers.values()]
