"""What every patch is measured against: the responses, and base and expert on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.criteria import (
    AnchorDirection,
    Criteria,
    CriterionFunction,
    Reference,
    Targets,
    needs_expert,
    split,
    wide,
)
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import own_values, record
from mergekit_wp.files.manifest import Anchor
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch, Sample, batches
from mergekit_wp.runs.anchor import Contrast, choose_anchor
from mergekit_wp.terms import CriterionName


@dataclass(frozen=True)
class References:
    """Reference values per criterion, and the targets of every batch.

    Attributes:
        batches: the prompts, padded.
        targets: one per batch.
        values: ``[prompts]`` at base and expert, per criterion.
        anchor: how the anchor was chosen, when there is one.
    """

    batches: list[PromptBatch]
    targets: list[Targets]
    values: dict[CriterionName, Reference]
    anchor: Anchor | None


@torch.no_grad()
def last_token_states(
    decoder: Decoder, samples: Iterable[PromptBatch], n_prompts: int
) -> torch.Tensor:
    """Residual stream at the last prompt token after every layer, ``[prompts, layers, hidden]``."""
    states: torch.Tensor | None = None
    for batch in samples:
        trace = record(decoder, batch)
        rows = torch.arange(batch.size, device=batch.ids.device)
        found = torch.stack([c.output[rows, batch.last] for c in trace.calls], 1)
        found = wide(found).cpu()
        if states is None:
            states = found.new_empty((n_prompts, *found.shape[1:]))
        states[batch.members] = found
    assert states is not None
    return states


def contrast_batches(
    contrasts: Mapping[int, list[int]], size: int, device: str
) -> tuple[list[int], list[PromptBatch]]:
    """Which prompts have a usable contrast, and the contrasts' token ids as batches."""
    samples = [Sample(tuple(ids)) for ids in contrasts.values()]
    return list(contrasts), list(batches(samples, size, device))


@torch.no_grad()
def measure_references(
    resident: ResidentModel,
    samples: Sequence[Sample],
    contrasts: tuple[list[int], list[PromptBatch]],
    criteria: Criteria,
    anchor_layer: int | None,
    batch_size: int,
    at_once: int | None = None,
    functions: Mapping[CriterionName, CriterionFunction] | None = None,
) -> References:
    """Run expert and base over all prompts; leaves the resident model at the base.

    Args:
        resident: the model in memory.
        samples: prompts with responses.
        contrasts: from `contrast_batches`; no members for the matched-checkpoint anchor.
        criteria: which criteria are asked for.
        anchor_layer: the anchor's layer, None to choose.
        batch_size: samples per batch.
        at_once: samples per forward, if fewer; contrasts go by their own batches.
        functions: the callers' criteria by name.

    Raises:
        UserError: a criterion that does not separate, or no anchor can be chosen.
    """
    decoder, at_once = Decoder(resident.model), at_once or batch_size
    device = resident.device
    every = list(batches(samples, batch_size, device))
    n = len(samples)
    prompt_only = list(batches([Sample(s.prompt_ids) for s in samples], at_once, device))
    outputs: Criteria = tuple(c for c in criteria if c != "anchor")

    resident.move_to(1.0)
    expert_logprobs: list[torch.Tensor | None] = [None] * len(every)
    if needs_expert(criteria):
        expert_logprobs = [logprobs(decoder, batch, at_once) for batch in every]
    towards = away = None
    if "anchor" in criteria:
        towards = last_token_states(decoder, prompt_only, n)
        if contrasts[0]:
            away = last_token_states(decoder, contrasts[1], len(contrasts[0]))
    plain = [Targets(logprobs, None, functions or {}) for logprobs in expert_logprobs]
    at_expert = values_of(decoder, every, plain, outputs, n, at_once)

    resident.move_to(0.0)
    at_base = values_of(decoder, every, plain, outputs, n, at_once)
    anchor: AnchorDirection | None = None
    info: Anchor | None = None
    if towards is not None:
        base_states = last_token_states(decoder, prompt_only, n)
        contrast = (
            Contrast(towards[contrasts[0]], away, base_states[contrasts[0]], True)
            if away is not None
            else Contrast(towards, base_states, base_states, False)
        )
        anchor, info = choose_anchor(contrast, anchor_layer)
        at_expert["anchor"] = towards[:, anchor.layer] @ anchor.vector
        at_base["anchor"] = base_states[:, anchor.layer] @ anchor.vector
        anchor = AnchorDirection(anchor.vector.to(device), anchor.layer)
    values = {name: Reference(at_base[name], at_expert[name]) for name in criteria}
    for name, reference in values.items():
        reference.check_separates(name)
    targets = [replace(target, anchor=anchor) for target in plain]
    return References(every, targets, values, info)


@torch.no_grad()
def references_at(
    resident: ResidentModel,
    samples: Sequence[Sample],
    criteria: Criteria,
    anchor: AnchorDirection | None,
    batch_size: int,
    at_once: int,
) -> References:
    """As `measure_references`, with an anchor that is given; leaves the model at the base.

    Args:
        resident: the model in memory.
        samples: prompts with responses.
        criteria: which criteria are asked for.
        anchor: of a score file.
        batch_size: samples per batch.
        at_once: samples per forward.

    Raises:
        UserError: a criterion that does not separate.
    """
    decoder, n = Decoder(resident.model), len(samples)
    every = list(batches(samples, batch_size, resident.device))
    resident.move_to(1.0)
    reads = needs_expert(criteria)
    of_expert = [logprobs(decoder, batch, at_once) if reads else None for batch in every]
    targets = [Targets(of_batch, anchor) for of_batch in of_expert]
    at_expert = values_of(decoder, every, targets, criteria, n, at_once)
    resident.move_to(0.0)
    at_base = values_of(decoder, every, targets, criteria, n, at_once)
    values = {name: Reference(at_base[name], at_expert[name]) for name in criteria}
    for name, reference in values.items():
        reference.check_separates(name)
    return References(every, targets, values, None)


def logprobs(decoder: Decoder, batch: PromptBatch, at_once: int | None = None) -> torch.Tensor:
    """Log-probabilities ``[P, vocabulary]`` at the positions that predict the response.

    Args:
        decoder: the model.
        batch: the prompts.
        at_once: samples per forward; all where None.
    """
    pieces = split(batch, Targets(), at_once or batch.size)
    parts = [_logprobs(decoder, part) for part, _ in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # rows of a batch are in order


def _logprobs(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    trace = record(decoder, batch)
    if trace.logits is not None:
        return torch.log_softmax(wide(trace.logits), -1)
    final = trace.residual(len(trace.calls) - 1)[batch.rows, batch.cols]
    return torch.log_softmax(wide(decoder.logits(final)), -1)


def values_of(
    decoder: Decoder,
    every: Sequence[PromptBatch],
    targets: Sequence[Targets],
    criteria: Criteria,
    n: int,
    at_once: int,
) -> dict[CriterionName, torch.Tensor]:
    """Values ``[prompts]`` per criterion, on the CPU, at the decoder's present weights.

    Args:
        decoder: the model.
        every: batches of all prompts.
        targets: one per batch.
        criteria: which criteria to read.
        n: prompts in all.
        at_once: samples per forward.
    """
    found: dict[CriterionName, torch.Tensor] = {}
    if not criteria:
        return found
    for batch, target in zip(every, targets, strict=True):
        for part, its in split(batch, target, at_once):
            own = own_values(decoder, record(decoder, part), criteria, its)
            for name, value in own.items():
                row = found.setdefault(name, torch.empty(n, dtype=value.dtype))
                row[part.members] = value.cpu()
    return found
