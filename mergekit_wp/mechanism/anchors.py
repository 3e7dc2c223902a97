"""Whether a behaviour has a usable anchor, and at which layer.

For every layer: how well the difference of means separates held-out prompts, how stable it is
between halves of the prompts, and whether adding it to the base brings the expert's behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from mergekit_wp.criteria import Reference, split
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.replay import Receiver, record
from mergekit_wp.errors import UserError
from mergekit_wp.mechanism.request import AnchorRequest
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample, batches, read_prompts
from mergekit_wp.runs.cluster import Assignment, SentModels, moved
from mergekit_wp.runs.journal import Unwritten
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Result
from mergekit_wp.runs.references import (
    Contrast,
    References,
    contrast_batches,
    held_out_separation,
    last_token_states,
    measure_references,
)
from mergekit_wp.runs.run import Opened, Run
from mergekit_wp.runs.warnings import warn_of_dtype
from mergekit_wp.statistics import Estimate, bootstrap, percentiles

#: random halves, and resamples of prompts
HALVES = 200
#: an anchor is usable from this effect size and this cosine between halves, if steering helps
SEPARATES, STABLE = 1.0, 0.5
MIN_CONTRASTS = 4


@dataclass(frozen=True)
class LayerAnchor:
    """One layer's anchor.

    Attributes:
        layer: read after this decoder layer.
        separation: effect size (Cohen's d) on held-out prompts, the weaker of with from without
            the instruction and expert from base.
        stability: mean cosine between the directions of two random halves, with the 95% range.
        steering: recovery of ``kl`` when the vector is added to the base there, 95% interval.
    """

    layer: int
    separation: float
    stability: Estimate
    steering: Estimate

    @property
    def usable(self) -> bool:
        """Whether it separates, is stable, and steering by it helps beyond its interval."""
        return (
            self.separation >= SEPARATES
            and self.stability.value >= STABLE
            and self.steering.low > 0
        )


@dataclass(frozen=True)
class AnchorOpened(Opened):
    """Anchors that can be looked for."""

    request: AnchorRequest


def find_anchors(request: AnchorRequest, progress: Progress) -> list[LayerAnchor]:
    """Every layer's anchor.

    Raises:
        UserError: fewer than four contrasts, or any other mistake in the inputs.
    """
    prompts = read_prompts(request.prompts, request.max_prompts)
    usable = tuple(prompt for prompt in prompts.prompts if prompt.usable_contrast)
    if len(usable) < MIN_CONTRASTS:
        raise UserError(
            f"{prompts.source} has {len(usable)} usable contrasts; halves of the prompts can be "
            f"compared from {MIN_CONTRASTS} on"
        )
    prompts = replace(prompts, prompts=usable)
    run = Run.open(request, request.base, request.expert, prompts, progress)
    run.pair.partition.dims.require_map("anchor")
    warn_of_dtype(request, progress)
    progress.plan(AnchorOpened(request, (run,), lambda: None))
    resident, texts = run.load(), run.texts
    samples = run.samples(resident, Unwritten())
    size = run.batch_size(samples)
    at_once = AtOnce(size, progress.note)
    references = at_once.run(
        lambda fewer: measure_references(resident, samples, ("kl",), size, fewer)
    )
    contrast = at_once.run(lambda fewer: _states(resident, samples, texts.contrasts, fewer))
    vectors = (contrast.towards - contrast.away).mean(0)
    separations = held_out_separation(contrast)
    assert separations is not None
    reference = references.values["kl"]
    steering = Steering(references, request.strength * vectors)
    work = SteeredLayers(resident, steering, at_once)

    def assignment(models: SentModels) -> Steered:
        return Steered(models, moved(steering, "cpu"), at_once.size)

    with run.jobs(Unwritten(), resident, assignment) as jobs:
        every = [SteeredLayer(layer) for layer in range(len(vectors))]
        return [
            LayerAnchor(
                layer=job.layer,
                separation=float(separations[job.layer]),
                stability=direction_stability(
                    contrast.towards[:, job.layer] - contrast.away[:, job.layer], request.seed
                ),
                steering=recovered(values["values"], reference, request.seed),
            )
            for job, values in jobs.finished("layers", "layer", every, work)
        ]


def _states(
    resident: ResidentModel,
    samples: Sequence[Sample],
    contrasts: dict[int, list[int]],
    size: int,
) -> Contrast:
    decoder, n = Decoder(resident.model), len(samples)
    alone = [Sample(s.prompt_ids) for s in samples]
    with_it = list(batches(alone, size, resident.device, resident.side))
    _, without = contrast_batches(contrasts, size, resident)
    resident.move_to(1.0)
    towards = last_token_states(decoder, with_it, n)
    away = last_token_states(decoder, without, n)
    resident.move_to(0.0)
    return Contrast(towards, away, last_token_states(decoder, with_it, n), True)


@dataclass(frozen=True)
class Steering:
    """What is added, and measured on.

    Attributes:
        references: prompts with responses.
        vectors: ``[layers, hidden]``.
    """

    references: References
    vectors: torch.Tensor


@dataclass(frozen=True)
class SteeredLayer:
    """The vector of one layer, added there."""

    layer: int

    @property
    def key(self) -> str:
        """What it is called."""
        return f"layer {self.layer}"


class SteeredLayers:
    """Measures the base with a vector added after a layer, at the last prompt token.

    That is where it was read. Added at the positions of the answer as well it took SmolLM2 further
    from the expert, not nearer.
    """

    def __init__(self, resident: ResidentModel, steering: Steering, at_once: AtOnce) -> None:
        self.resident, self.steering, self.at_once = resident, steering, at_once

    def __call__(self, job: SteeredLayer) -> Result:
        """``kl`` values ``[prompts]``."""
        self.resident.move_to(0.0)
        return self.at_once.run(partial(self._steered, job.layer))

    @torch.no_grad()
    def _steered(self, layer: int, at_once: int) -> Result:
        references = self.steering.references
        vector, decoder = self.steering.vectors[layer], Decoder(self.resident.model)
        found = torch.empty(len(references.values["kl"].base), dtype=torch.float64)
        pairs = zip(references.batches, references.targets, strict=True)
        for batch, target in (part for pair in pairs for part in split(*pair, at_once)):
            receiver = Receiver(decoder, record(decoder, batch), ("kl",), target)
            hidden = receiver.recording.residual(layer)
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            there = positions[None] == batch.last[:, None]
            moved_there = hidden + there[..., None] * vector.to(hidden)
            values = receiver.replay(moved_there[None], layer)["kl"][0]
            found[batch.members] = values.double().cpu()
        return {"values": found}


@dataclass(frozen=True)
class Steered(Assignment):
    """The layers of one behaviour."""

    models: SentModels
    steering: Steering
    batch_size: int

    def begin(self, told: Callable[[str], None]) -> Callable[[SteeredLayer], Result]:
        """Open the models."""
        [pair] = self.models.opened()
        resident = self.models.loaded(pair)
        steering = moved(self.steering, resident.device)
        return SteeredLayers(resident, steering, AtOnce(self.batch_size, told))


def direction_stability(differences: torch.Tensor, seed: int) -> Estimate:
    """Cosine between the mean differences of two random halves of the prompts.

    Args:
        differences: with minus without the instruction, ``[prompts, hidden]``.
        seed: of the halves.
    """
    rng, n = np.random.default_rng(seed), len(differences)
    values = differences.double().numpy()
    cosines = []
    for _ in range(HALVES):
        order = rng.permutation(n)
        one, two = values[order[: n // 2]].mean(0), values[order[n // 2 :]].mean(0)
        scale = np.linalg.norm(one) * np.linalg.norm(two)
        cosines.append(float(one @ two / scale) if scale > 0 else 0.0)
    return percentiles(float(np.mean(cosines)), np.array(cosines))


def recovered(values: torch.Tensor, reference: Reference, seed: int) -> Estimate:
    """Recovery with its bootstrap interval over prompts."""
    base, expert = (side.double().cpu().numpy() for side in (reference.base, reference.expert))
    counts = bootstrap(len(base), np.random.default_rng(seed))
    change, distance = values.numpy() - base, expert - base
    drawn = (counts @ change) / (counts @ distance)
    return percentiles(float(change.mean() / distance.mean()), drawn[np.isfinite(drawn)])


def best_anchor(found: Sequence[LayerAnchor]) -> LayerAnchor | None:
    """The usable layer that separates best, if there is one."""
    usable = [layer for layer in found if layer.usable]
    return max(usable, key=lambda layer: layer.separation, default=None)
