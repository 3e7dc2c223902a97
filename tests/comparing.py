"""A comparison of merges of a tiny family, on tasks that look at one weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration

from mergekit_wp.comparison.methods import methods_of
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.results import Results
from mergekit_wp.comparison.rows import Comparison
from mergekit_wp.comparison.run import Runner
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split
from tests.merging import Family, llama_config
from tests.models import save_tokenizer

torch.set_num_threads(1)

NORM = "model.norm.weight"


def asked_family(folder: Path) -> Family:
    """A family whose models can be asked."""
    made = Family.make(folder, llama_config(vocab_size=40))
    for model in (made.base, *made.experts):
        save_tokenizer(model.path)
    return made


@dataclass
class Distance:
    """A task that is solved the better the closer one weight is to where it should be."""

    name: str
    goal: torch.Tensor
    counts: dict[str, int] = field(default_factory=lambda: {"valid": 3, "test": 4})
    fingerprint: str = "1"
    asked: list[str] = field(default_factory=list)
    fail_when: Any = None

    def count(self, split: Split) -> int:
        return self.counts[split]

    def question(self, item: str) -> str:
        return f"item {item} of {self.name}"

    def too_long(self, _model: Any, _tokenizer: Any) -> None:
        return None

    def evaluate(
        self, model: Any, asked: TextInterface, split: Split, at_once: AtOnce | None = None
    ) -> list[ItemScore]:
        weight = model.model.norm.weight
        self.asked.append(split)
        if self.fail_when is not None and self.fail_when(weight):
            raise self.error
        score = 1 / (1 + float((weight - self.goal).abs().mean()))
        return [ItemScore(str(i), score) for i in range(self.counts[split])]

    error: BaseException = field(default_factory=lambda: ValueError("no\nway"))


def make_plan(family: Family, task: Distance, names: tuple[str, ...], **options: Any) -> Plan:
    recipe = MergeConfiguration.model_validate(family.recipe())
    settings: dict[str, Any] = {
        "base": str(family.base.path),
        "experts": tuple(str(e.path) for e in family.experts),
        "names": ("expert0", "expert1"),
        "recipe": recipe,
        "extra": {},
        "methods": methods_of(names, 2, recipe),
        "tasks": (task,),
        "dtype": "float32",
        "device": "cpu",
        "eval_dtype": torch.float32,
    }
    return Plan(**(settings | options))


def run(plan: Plan, folder: Path, inputs: dict[str, Any] | None = None) -> Comparison:
    with Results(folder, inputs or {"a": 1}) as results:
        return Runner(plan, results, NoProgress()).run()


def planted(family: Family, weight: float) -> torch.Tensor:
    """Where task arithmetic with this weight puts the final norm."""
    start = family.base.state[NORM]
    return start + weight * sum(e.state[NORM] - start for e in family.experts)


def merged_by(
    family: Family, folder: Path, name: str, prompts: Any = (), **changed: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """What a peer merges at its authors' parameters, and its row."""
    task = Kept("near", planted(family, 0.5))
    plan = make_plan(family, task, (name,), tuned=False, prompts=prompts, max_new_tokens=4)
    (method,) = plan.methods
    plan = replace(plan, methods=(replace(method, untuned=method.untuned | changed),))
    plan.check()
    row = run(plan, folder).rows[-1]
    assert row.failed is None, row.failed
    return task.seen, row


class Kept(Distance):
    """Keeps the weights that it saw last."""

    def evaluate(self, model: Any, *args: Any) -> Any:
        self.seen = {n: p.detach().clone() for n, p in model.named_parameters()}
        return super().evaluate(model, *args)


def is_end(name: str) -> bool:
    return "embed" in name or "lm_head" in name
