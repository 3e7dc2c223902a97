"""A batch of prompts in parts, each with what it is measured against."""

from __future__ import annotations

from dataclasses import replace

from mergekit_wp.criteria import Targets
from mergekit_wp.prompts import PromptBatch


def target_part(batch: PromptBatch, targets: Targets, start: int, stop: int) -> Targets:
    """What some of a batch's samples are measured against."""
    if targets.expert_logprobs is None:
        return targets
    own = batch.in_part(start, stop)
    return replace(targets, expert_logprobs=targets.expert_logprobs[own])


def split(batch: PromptBatch, targets: Targets, size: int) -> list[tuple[PromptBatch, Targets]]:
    """A batch in parts of at most `size` samples, with what each is measured against."""
    if batch.size <= size:
        return [(batch, targets)]
    cuts = [(start, min(batch.size, start + size)) for start in range(0, batch.size, size)]
    return [(batch.part(*cut), target_part(batch, targets, *cut)) for cut in cuts]
