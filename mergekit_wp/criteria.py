"""Criteria: how far a model stands between base (0) and expert (1).

Every criterion is a value per prompt, v_i(theta), averaged over prompts before the division:

    r(theta) = (mean v(theta) - mean v(base)) / (mean v(expert) - mean v(base))

unless each prompt is to be divided by its own difference (`per_prompt`).

- ``kl``: v = -KL(p_expert || p_theta), mean over the positions that predict the response
- ``logprob``: v = mean log-probability of the response tokens
- ``anchor``: v = <u, h>, h the residual stream after the anchor layer at the last prompt token

A prompt's value is a mean over its own positions, so prompts of any length count alike.

What is read from logits stands in one table, `OUTPUT`: an entry there and its name in
`terms.BuiltInCriterion` are a new criterion. A caller may also give a function of his own.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.prompts import PromptBatch
from mergekit_wp.terms import CRITERIA, CriterionName

Criteria = tuple[CriterionName, ...]
#: a caller's criterion: logits ``[P, vocabulary]`` that predict the responses, in float32 or
#: float64, and their batch to ``[n]``; a prompt's value comes from its own positions alone
CriterionFunction = Callable[[torch.Tensor, PromptBatch], torch.Tensor]
#: names that no caller's function may have; `verify` measures checked answers under the last
RESERVED = (*CRITERIA, "behavior")


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
        functions: the callers' criteria by name.
    """

    expert_logprobs: torch.Tensor | None = None
    anchor: AnchorDirection | None = None
    functions: Mapping[CriterionName, CriterionFunction] = field(default_factory=dict)


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


def reproduced(logits: torch.Tensor, batch: PromptBatch, targets: Targets) -> torch.Tensor:
    """How much of each response is reproduced: logits ``[P, vocabulary]`` to ``[2, n]``.

    First whether all of it is, 1 or 0: where at every position the likeliest token is the expert's
    likeliest, greedy decoding gives the expert's answer, if the response is one. Then the share of
    positions at which it is.
    """
    assert targets.expert_logprobs is not None
    wrong = logits.argmax(-1) != targets.expert_logprobs.argmax(-1)
    lost = per_prompt_mean(wrong.double(), batch)
    return torch.stack([(lost == 0).double(), 1 - lost])


def logprob_values(logits: torch.Tensor, batch: PromptBatch, _targets: Targets) -> torch.Tensor:
    """Mean log-probability of the response: ``[..., P, vocabulary]`` to ``[..., n]``."""

    def chosen(own: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(wide(own), -1)
        return logprobs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)

    return per_prompt_mean(_one_by_one(chosen, logits), batch)


def _one_by_one(read: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """What is read of every patch's logits ``[P, vocabulary]``, ``[..., P]`` or ``[..., n]``.

    Of one patch, all that is made on the way fits into caches; of many, it takes longer to write
    than to compute.
    """
    if logits.dim() == 2:
        return read(logits)
    return torch.stack([_one_by_one(read, one) for one in logits])


@dataclass(frozen=True)
class Criterion:
    """A criterion that is read from logits.

    Attributes:
        words: what it is, for reports.
        values: from logits ``[..., P, vocabulary]``, their batch and its targets to ``[..., n]``.
        needs_expert: whether it reads the expert's distribution among the targets.
        log_probability: whether it is a mean of log-probabilities, but for a constant: a change of
            logits then costs half its variance under the model's own distribution besides what
            the gradient says, and estimates are made to second order.
        maximal_at_expert: whether the expert is its maximum, so that the gradient vanishes there.
    """

    words: str
    values: Callable[[torch.Tensor, PromptBatch, Targets], torch.Tensor]
    needs_expert: bool = False
    log_probability: bool = False
    maximal_at_expert: bool = False


#: by name: every built-in criterion but the anchor, which is read from the residual stream
OUTPUT: dict[CriterionName, Criterion] = {
    "kl": Criterion(
        "closeness to the expert's next-token distribution over the response",
        kl_values,
        needs_expert=True,
        log_probability=True,
        maximal_at_expert=True,
    ),
    "logprob": Criterion(
        "mean log-probability of the response", logprob_values, log_probability=True
    ),
}


def criterion_words(name: CriterionName) -> str:
    """What a criterion is, for reports."""
    if name == "anchor":
        return "position along the behaviour's direction in the residual stream"
    return OUTPUT[name].words if name in OUTPUT else f"what the caller's function {name} says"


def needs_expert(criteria: Criteria) -> bool:
    """Whether any of the criteria reads the expert's distribution."""
    return any(name in OUTPUT and OUTPUT[name].needs_expert for name in criteria)


def log_probability(name: CriterionName) -> bool:
    """Whether estimates by it are made to second order, see `Criterion`."""
    return name in OUTPUT and OUTPUT[name].log_probability


def maximal_at_expert(name: CriterionName) -> bool:
    """Whether its gradient vanishes at the expert, see `Criterion`."""
    return name in OUTPUT and OUTPUT[name].maximal_at_expert


def logit_values(
    logits: torch.Tensor, batch: PromptBatch, criteria: Criteria, targets: Targets
) -> dict[CriterionName, torch.Tensor]:
    """Values ``[..., n]`` of the criteria but the anchor, from logits ``[..., P, vocabulary]``.

    Raises:
        UserError: a caller's criterion whose function is not at hand, or does not do its part.
    """
    found: dict[CriterionName, torch.Tensor] = {}
    for name in criteria:
        if name in targets.functions:
            found[name] = _values_of_caller(name, targets.functions[name], logits, batch)
        elif name in OUTPUT:
            found[name] = OUTPUT[name].values(logits, batch, targets)
        elif name != "anchor":
            raise UserError(
                f"criterion '{name}' is a caller's function, which is not at hand here; choose "
                f"one of {', '.join(CRITERIA)}"
            )
    return found


def _values_of_caller(
    name: str, function: CriterionFunction, logits: torch.Tensor, batch: PromptBatch
) -> torch.Tensor:
    def read(own: torch.Tensor) -> torch.Tensor:
        values = function(wide(own), batch)
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else None
        if shape != (batch.size,):
            raise UserError(
                f"criterion '{name}' returned {'no tensor' if shape is None else list(shape)}; "
                f"expected one value for each of {batch.size} prompts, [batch.size]"
            )
        if not values.is_floating_point() or not values.isfinite().all():
            raise UserError(
                f"criterion '{name}' returned {values.dtype} values that are not all finite "
                "floating-point numbers; make it finite for any logits"
            )
        if own.requires_grad and not values.requires_grad:
            raise UserError(
                f"criterion '{name}' has no gradient, which shares and first-order scores need; "
                "make it differentiable, or score only gain and knockout of kinds whose swaps "
                "are all exact"
            )
        return values

    return _one_by_one(read, logits)


def named(
    asked: Iterable[CriterionName | CriterionFunction],
) -> tuple[Criteria, dict[CriterionName, CriterionFunction]]:
    """The names of criteria, and the callers' functions among them by name.

    Raises:
        UserError: a function whose name cannot stand in a file or is taken, or a name twice.
    """
    names: list[CriterionName] = []
    functions: dict[CriterionName, CriterionFunction] = {}
    for one in asked:
        name = one if isinstance(one, str) else str(getattr(one, "__name__", repr(one)))
        if name in names:
            raise UserError(f"criterion '{name}' is given twice")
        names.append(name)
        if isinstance(one, str):
            continue
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise UserError(
                f"criterion {name:.80}: files and recipes know a function by its name, so define "
                "it with 'def', under a name of at most 64 letters, digits and underscores"
            )
        if name in RESERVED:
            raise UserError(f"criterion '{name}' is the name of another; rename your function")
        functions[name] = one
    return tuple(names), functions


def source_sha256(function: CriterionFunction) -> str | None:
    """Hash of a function's source, None where Python does not have it."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def anchor_values(
    hidden: torch.Tensor, batch: PromptBatch, anchor: AnchorDirection
) -> torch.Tensor:
    """Projection on the anchor: hidden ``[..., rows, T, hidden]`` to ``[..., n]``."""
    at_last = hidden[..., batch.last_rows, batch.last, :]
    return wide(at_last) @ anchor.vector


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


#: a prompt whose base and expert differ by less than this part of the mean difference says nothing
#: about how far a patch goes from one to the other
SMALL_GAP = 0.05


def has_gap(distance: torch.Tensor) -> torch.Tensor:
    """Which prompts can be divided by their own distance ``[prompts]``; at least one can.

    Their distance, of either sign, is at least `SMALL_GAP` of the mean size of all.
    """
    size = distance.abs()
    return size >= SMALL_GAP * size.mean()


def per_prompt(change: torch.Tensor, distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes in units of each prompt's own distance, of the prompts that have one.

    `recovery` then takes the mean of quotients instead of the quotient of means: the score of
    "Weight Patching" (arXiv 2604.13694), but for the prompts that are left out.

    Args:
        change: ``[..., prompts]``.
        distance: ``[prompts]``.

    Returns:
        Changes ``[..., prompts left]``, and the distance 1 of each.
    """
    kept = has_gap(distance)
    return change[..., kept] / distance[kept], torch.ones_like(distance[kept])


def part_of(
    batch: PromptBatch, targets: Targets, start: int, stop: int
) -> tuple[PromptBatch, Targets]:
    """Some of a batch's samples, with what they are measured against."""
    if (start, stop) == (0, batch.size):
        return batch, targets
    part = batch.part(start, stop)
    if targets.expert_logprobs is None:
        return part, targets
    own = batch.in_part(start, stop)
    return part, replace(targets, expert_logprobs=targets.expert_logprobs[own])


def split(batch: PromptBatch, targets: Targets, size: int) -> list[tuple[PromptBatch, Targets]]:
    """A batch in parts of at most `size` samples, with what each is measured against."""
    starts = range(0, batch.size, size)
    return [part_of(batch, targets, start, min(batch.size, start + size)) for start in starts]
