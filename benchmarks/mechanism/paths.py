"""Where the benchmark reads and writes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.smollm2.paths import BUILD as SMOLLM2
from benchmarks.smollm2.paths import REPO
from mergekit_wp.terms import Estimand

WORK = REPO / "build" / "mechanism"
BASE, EXPERT = SMOLLM2 / "base", SMOLLM2 / "experts" / "instruction"
OTHER_SEED = WORK / "instruction-seed1"
SKILL, TASK = SMOLLM2 / "tasks" / "instruction.jsonl", WORK / "items.jsonl"
#: the first are scored on, the next held out
PROMPTS = SMOLLM2 / "prompts" / "instruction.jsonl"
HELD_OUT = WORK / "held-out.jsonl"
SCORES, TRACE = WORK / "instruction.safetensors", WORK / "trace.json"
BEHAVIORS = ("capitals", "no-comma", "title", "sections", "quotation", "highlights")
#: what sets of weights are chosen by
RANKINGS: tuple[Estimand, ...] = ("share", "gain", "activation_gain", "knockout")


def verified(estimand: str) -> Path:
    """The score file with the verification of one ranking."""
    return WORK / f"verified-{estimand}.safetensors"


def behavior_scores(name: str) -> Path:
    """Shares of one behaviour."""
    return WORK / f"shares-{name}.safetensors"
