"""Criteria: how far a model stands between base (0) and expert (1).

Every criterion is a value per prompt, v_i(theta), averaged over prompts before the division:

    r(theta) = (mean v(theta) - mean v(base)) / (mean v(expert) - mean v(base))

- ``kl``: v = -KL(p_expert || p_theta), mean over the positions that predict the response
- ``logprob``: v = mean log-probability of the response tokens
- ``anchor``: v = <u, h>, h the residual stream after the anchor layer at the last prompt token

A prompt's value is a mean over its own positions, so prompts of any length count alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CriterionName


@dataclass(frozen=True)
class AnchorDirection:
    """Unit vector ``[hidden]`` read after decoder layer `layer`."""

    vector: torch.Tensor
    layer: int


@dataclass(frozen=True)
class Targets:
    """What a batch's values are measured against.

    Attributes:
        expert_logprobs: ``[P, vocabulary]`` of the expert, for ``kl``.
        anchor: the anchor direction, for ``anchor``.
    """

    expert_logprobs: torch.Tensor | None = None
    anchor: AnchorDirection | None = None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Scores are computed in fp32, or fp64 when the model is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def per_prompt_mean(values: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """Mean over each prompt's positions: ``[..., P]`` to ``[..., n]``."""
    # a product, for on GPUs index_add adds in whatever order its threads come
    belongs = torch.nn.functional.one_hot(batch.owners, batch.size).to(values.dtype)
    return values @ belongs / belongs.sum(0)


def kl_values(logits: torch.Tensor, batch: PromptBatch, targets: Targets) -> torch.Tensor:
    """-KL(p_expert || p): logits ``[..., P, vocabulary]`` to ``[..., n]``."""
    assert targets.expert_logprobs is not None
    expert = targets.expert_logprobs
    probability = expert.exp()

    def divergence(own: torch.Tensor) -> torch.Tensor:
        return (probability * (expert - torch.log_softmax(wide(own), -1))).sum(-1)

    return -per_prompt_mean(_one_by_one(divergence, logits), batch)


def logprob_values(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """Mean log-probability of the response: ``[..., P, vocabulary]`` to ``[..., n]``."""

    def chosen(own: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(wide(own), -1)
        return logprobs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)

    return per_prompt_mean(_one_by_one(chosen, logits), batch)


def _one_by_one(read: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """What is read of every patch's logits ``[P, vocabulary]``, ``[..., P]``.

    Of one patch, all that is made on the way fits into caches; of many, it takes longer to write
    than to compute.
    """
    if logits.dim() == 2:
        return read(logits)
    return torch.stack([_one_by_one(read, one) for one in logits])


def anchor_values(hidden: torch.Tensor, batch: PromptBatch, anchor: torch.Tensor) -> torch.Tensor:
    """Projection on the anchor: hidden ``[..., rows, T, hidden]`` to ``[..., n]``."""
    at_last = hidden[..., batch.last_rows, batch.last, :]
    return wide(at_last) @ anchor


@dataclass(frozen=True)
class Reference:
    """Values ``[prompts]`` of one criterion at the base and at the expert."""

    base: torch.Tensor
    expert: torch.Tensor

    @property
    def distance(self) -> torch.Tensor:
        """v(expert) - v(base) per prompt."""
        return self.expert - self.base

    def check_separates(self, name: str) -> None:
        """Refuse a criterion on which base and expert do not differ.

        Raises:
            UserError: says the separation found.
        """
        found = float(self.distance.mean())
        size = max(float(self.base.abs().mean()), float(self.expert.abs().mean()))
        rounding = 1e-12 if self.base.dtype == torch.float64 else 1e-6
        if abs(found) <= rounding * max(size, 1.0):
            raise UserError(
                f"criterion '{name}' does not separate base from expert: they differ by "
                f"{found:.2e} on these prompts; use prompts on which the expert behaves "
                "differently, or another criterion"
            )


def recovery(change: torch.Tensor, distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Recovered fraction and its standard error over prompts.

    Args:
        change: ``[..., prompts]``, v(patched) - v(receiver).
        distance: ``[prompts]``, v(expert) - v(base).

    Returns:
        The ratio of means ``[...]`` and its delta-method standard error ``[...]`` (NaN for a
        single prompt, which says nothing about spread).
    """
    n = distance.numel()
    ratio = change.mean(-1) / distance.mean()
    residual = change - ratio.unsqueeze(-1) * distance
    variance = residual.square().sum(-1) / (n * (n - 1)) if n > 1 else ratio * torch.nan
    return ratio, variance.sqrt() / distance.mean().abs()


Criteria = tuple[CriterionName, ...]


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
