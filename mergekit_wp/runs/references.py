"""What every patch is measured against: the responses, and base and expert on the same inputs.

The anchor is a direction in the residual stream and the layer to read it at.
With contrasts (the same request without the instruction) the direction is the difference of
means, expert with instruction minus expert without; without contrasts it is expert minus base,
the matched-checkpoint anchor. The layer is chosen by how well the projection
separates on held-out prompts (each is projected on the direction of the others): both with from
without the instruction, else the direction does not stand for it, and expert from base, else
recovery along it means nothing. The weaker of the two counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_wp.criteria import (
    OUTPUT,
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
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.manifest import Anchor
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import PromptBatch, Sample, batches
from mergekit_wp.terms import CriterionName

#: fewest prompts from which a layer can be chosen on held-out ones
MIN_HELD_OUT = 2


@dataclass(frozen=True)
class References:
    """Reference values per criterion, and the targets of every batch.

    Attributes:
        batches: the prompts, padded.
        targets: one per batch.
        values: ``[prompts]`` at base and expert, per criterion.
        anchor: how the anchor was chosen, when there is one.
        likelihood: of the responses, ``[prompts]`` mean log-probabilities at base and expert, where
            a criterion reads logits.
    """

    batches: list[PromptBatch]
    targets: list[Targets]
    values: dict[CriterionName, Reference]
    anchor: Anchor | None
    likelihood: Reference | None = None


@torch.no_grad()
def last_token_states(
    decoder: Decoder, samples: Iterable[PromptBatch], n_prompts: int
) -> torch.Tensor:
    """Residual stream at the last prompt token after every layer, ``[prompts, layers, hidden]``."""
    states: torch.Tensor | None = None
    for batch in samples:
        calls = record(decoder, batch).calls
        rows = torch.arange(batch.size, device=batch.ids.device)
        found = torch.stack([c.output[rows, batch.last] for c in calls], 1)
        found = wide(found).cpu()
        if states is None:
            states = found.new_empty((n_prompts, *found.shape[1:]))
        states[batch.members] = found
    assert states is not None
    return states


def contrast_batches(
    contrasts: Mapping[int, list[int]], size: int, resident: ResidentModel
) -> tuple[list[int], list[PromptBatch]]:
    """Which prompts have a usable contrast, and the contrasts' token ids as batches."""
    samples = [Sample(tuple(ids)) for ids in contrasts.values()]
    return list(contrasts), list(batches(samples, size, resident.device, resident.side))


@torch.no_grad()
def measure_references(
    resident: ResidentModel,
    samples: Sequence[Sample],
    criteria: Criteria,
    batch_size: int,
    at_once: int | None = None,
    *,
    apart: Collection[int] = (),
    contrasts: tuple[list[int], list[PromptBatch]] = ([], []),
    anchor_layer: int | None = None,
    anchor: AnchorDirection | None = None,
    functions: Mapping[CriterionName, CriterionFunction] | None = None,
) -> References:
    """Run expert and base over all prompts; leaves the resident model at the base.

    Args:
        resident: the model in memory.
        samples: prompts with responses.
        criteria: which criteria are asked for.
        batch_size: samples per batch.
        at_once: samples per forward, if fewer; contrasts go by their own batches.
        apart: which samples are in batches of their own.
        contrasts: from `contrast_batches`; no members for the matched-checkpoint anchor.
        anchor_layer: the anchor's layer, None to choose.
        anchor: of a score file; one is found where it is None and asked for.
        functions: the callers' criteria by name.

    Raises:
        UserError: a criterion that does not separate, or no anchor can be chosen.
    """
    decoder, at_once = Decoder(resident.model), at_once or batch_size
    device, side, n = resident.device, resident.side, len(samples)
    every = list(batches(samples, batch_size, device, side, apart))
    alone = [Sample(s.prompt_ids) for s in samples]
    prompt_only = list(batches(alone, at_once, device, side))
    finds_anchor = "anchor" in criteria and anchor is None
    given: Criteria = tuple(c for c in criteria if c != "anchor" or not finds_anchor)
    head = resident.model.get_output_embeddings().weight  # a classifier's has not all tokens
    tokens = all(bool((batch.targets < head.shape[0]).all()) for batch in every)
    if not OUTPUT.keys().isdisjoint(given) and "logprob" not in given and tokens:
        given = (*given, "logprob")  # which says whether the expert is the better one

    resident.move_to(1.0)
    reads = needs_expert(criteria)
    of_expert = [logprobs(decoder, batch, at_once) if reads else None for batch in every]
    towards = away = None
    if finds_anchor:
        towards = last_token_states(decoder, prompt_only, n)
        if contrasts[0]:
            away = last_token_states(decoder, contrasts[1], len(contrasts[0]))
    targets = [Targets(of_batch, anchor, functions or {}) for of_batch in of_expert]
    at_expert = values_of(decoder, every, targets, given, n, at_once)

    resident.move_to(0.0)
    at_base = values_of(decoder, every, targets, given, n, at_once)
    info: Anchor | None = None
    if towards is not None:
        base_states = last_token_states(decoder, prompt_only, n)
        contrast = (
            Contrast(towards[contrasts[0]], away, base_states[contrasts[0]], True)
            if away is not None
            else Contrast(towards, base_states, base_states, False)
        )
        found, info = choose_anchor(contrast, anchor_layer)
        at_expert["anchor"] = towards[:, found.layer] @ found.vector
        at_base["anchor"] = base_states[:, found.layer] @ found.vector
        anchor = AnchorDirection(found.vector.to(device), found.layer)
        targets = [replace(target, anchor=anchor) for target in targets]
    values = {name: Reference(at_base[name], at_expert[name]) for name in criteria}
    for name, reference in values.items():
        reference.check_separates(name)
    likelihood = (
        Reference(at_base["logprob"], at_expert["logprob"]) if "logprob" in at_base else None
    )
    return References(every, targets, values, info, likelihood)


def anchor_of(file: ScoreFile, resident: ResidentModel) -> AnchorDirection | None:
    """The anchor of a score file, where a model is."""
    if file.manifest.anchor is None:
        return None
    # a copy: products by a vector that lies anywhere in a file's bytes round differently
    vector = file.tensors["anchor/vector"].to(resident.device, copy=True)
    precise = torch.promote_types(resident.dtype, torch.float32)
    return AnchorDirection(vector.to(precise), file.manifest.anchor.layer)


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
    return torch.log_softmax(wide(response_logits(decoder, batch)), -1)


def response_logits(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    """Logits ``[P, vocabulary]`` at the positions that predict the response."""
    recording = record(decoder, batch)
    if recording.logits is not None:
        return recording.logits
    final = recording.residual(len(recording.calls) - 1)[batch.rows, batch.cols]
    return decoder.logits(final)


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
            own = Receiver(decoder, record(decoder, part), criteria, its).own
            for name, value in own.items():
                row = found.setdefault(name, torch.empty(n, dtype=value.dtype))
                row[part.members] = value.cpu()
    return found


@dataclass(frozen=True)
class Contrast:
    """Hidden states at the last prompt token after every layer, ``[prompts, layers, hidden]``.

    Attributes:
        towards: the expert, with the instruction.
        away: the expert without it, or the base.
        base: the base, with the instruction.
        from_instruction: whether `away` is the expert without the instruction.
    """

    towards: torch.Tensor
    away: torch.Tensor
    base: torch.Tensor
    from_instruction: bool


def direction(towards: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """Unit difference of means: two ``[prompts, ..., hidden]`` to ``[..., hidden]``."""
    difference = towards.mean(0) - away.mean(0)
    unit: torch.Tensor = difference / torch.linalg.vector_norm(
        difference, dim=-1, keepdim=True
    ).clamp_min(1e-30)
    return unit


def separation(towards: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """Effect size (Cohen's d) of two sets of projections, ``[prompts, layers]`` to ``[layers]``."""
    spread = ((towards.var(0) + away.var(0)) / 2).sqrt()
    scale = torch.maximum(towards.abs().mean(0), away.abs().mean(0))
    return (towards.mean(0) - away.mean(0)) / (spread + 1e-6 * scale + 1e-30)


def held_out_separation(contrast: Contrast) -> torch.Tensor | None:
    """Weaker separation per layer, every prompt projected on the direction of the others.

    Returns:
        ``[layers]``; None with fewer than `MIN_HELD_OUT` prompts.
    """
    n = contrast.towards.shape[0]
    if n < MIN_HELD_OUT:
        return None
    difference = contrast.towards - contrast.away
    others = (difference.sum(0) - difference) / (n - 1)
    u = others / torch.linalg.vector_norm(others, dim=-1, keepdim=True).clamp_min(1e-30)
    towards, away, base = (
        (side * u).sum(-1) for side in (contrast.towards, contrast.away, contrast.base)
    )
    return torch.minimum(separation(towards, away), separation(towards, base))


def choose_anchor(contrast: Contrast, layer: int | None) -> tuple[AnchorDirection, Anchor]:
    """The anchor at a given layer, or at the one that separates best.

    Args:
        contrast: the two sets of hidden states.
        layer: the layer, or None to choose.

    Raises:
        UserError: too few prompts to choose from, or a layer out of range.
    """
    n, n_layers = contrast.towards.shape[:2]
    separations = held_out_separation(contrast)
    if layer is None:
        if separations is None:
            raise UserError(
                f"{option('anchor_layer', 'auto')} needs at least {MIN_HELD_OUT} prompts to choose "
                f"on held-out ones, not {n}; give more prompts or set the layer"
            )
        layer = int(separations.argmax())
    elif not 0 <= layer < n_layers:
        raise UserError(
            f"{option('anchor_layer', layer)} is out of range: the model has layers 0 to "
            f"{n_layers - 1}"
        )
    vector = direction(contrast.towards[:, layer], contrast.away[:, layer])
    if not vector.any():
        raise UserError(
            f"criterion 'anchor' does not separate: the difference of means at layer {layer} is 0"
        )
    info = Anchor(
        layer=layer,
        contrast="instruction" if contrast.from_instruction else "checkpoint",
        separation=None if separations is None else float(separations[layer]),
        n_contrasts=n if contrast.from_instruction else 0,
    )
    return AnchorDirection(vector, layer), info
