"""Which experts are looked at, and where the benchmark reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.files import REPO
from benchmarks.gemma3.tasks import GEMMA3
from benchmarks.smollm2.paths import SMOLLM2
from mergekit_wp.terms import CriterionName, Estimand

BEHAVIORS = ("capitals", "no-comma", "title", "sections", "quotation", "highlights")
#: what sets of weights are chosen by
RANKINGS: tuple[Estimand, ...] = ("share", "gain", "activation_gain", "knockout")


@dataclass(frozen=True)
class Study:
    """One expert that is looked at.

    Attributes:
        work: where everything of it is written.
        base, expert: checkpoints.
        skill: its items, validation and test.
        prompts: to score on.
        scored: how many prompts of these.
        criteria: an anchor needs prompts with contrasts.
        held_out: prompts that sets are verified on: the next of ``prompts``, or, where there are no
            more, of the validation items.
        answered: test items of which the answers are checked.
        max_new_tokens: of an answer.
        other_seed: the expert of another training seed, None for none.
        builtin: whether the built-in behaviours are in what the expert learnt.
    """

    work: Path
    base: Path
    expert: Path
    skill: Path
    prompts: Path
    scored: int
    criteria: tuple[CriterionName, ...]
    held_out: int
    answered: int
    max_new_tokens: int
    other_seed: Path | None
    builtin: bool

    @property
    def scores(self) -> Path:
        """The score file."""
        return self.work / f"{self.expert.name}.safetensors"

    @property
    def trace(self) -> Path:
        """The circuit."""
        return self.work / "trace.json"

    @property
    def others(self) -> Path:
        """Prompts that are not scored on."""
        return self.work / "held-out.jsonl"

    @property
    def items(self) -> Path:
        """Items of which the answers are checked."""
        return self.work / "items.jsonl"

    def verified(self, estimand: str) -> Path:
        """The score file with the verification of one ranking."""
        return self.work / f"verified-{estimand}.safetensors"

    def shares(self, name: str) -> Path:
        """Shares of one behaviour."""
        return self.work / f"shares-{name}.safetensors"


STUDIES = {
    "smollm2": Study(
        work=REPO / "build" / "mechanism",
        base=SMOLLM2.base,
        expert=SMOLLM2.expert("instruction"),
        skill=SMOLLM2.task("instruction"),
        prompts=SMOLLM2.prompts("instruction"),
        scored=8,
        criteria=("kl", "anchor"),
        held_out=8,
        answered=12,
        max_new_tokens=32,
        other_seed=replace(SMOLLM2, seed=1).expert("instruction"),
        builtin=True,
    ),
    "gemma3": Study(
        work=REPO / "build" / "mechanism-gemma3",
        base=GEMMA3.base,
        expert=GEMMA3.expert("reversal"),
        skill=GEMMA3.task("reversal"),
        prompts=GEMMA3.prompts("reversal"),
        scored=32,
        criteria=("kl",),
        held_out=16,
        answered=24,
        max_new_tokens=28,
        other_seed=None,
        builtin=False,
    ),
}
