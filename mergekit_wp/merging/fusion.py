"""From component scores to gates, and from gates to merged weights.

Source: the share rule and the cut to an expert's best components are ours; "Weight Patching"
(arXiv 2604.13694) says only that component scores guide the merge. Pure maths: no I/O, no mergekit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_wp.terms import Fusion

#: Elements that `fuse` and `delta_norm` widen at a time, so that a bf16 merge of a large tensor
#: needs no fp32 copy of it.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Normalised:
    """One expert's scores over a whole partition, comparable between experts.

    ``values`` are float64, divided by the sum of the expert's positive scores over all kinds
    together (all zero where no score is positive). ``ranks`` count from 0 for the best component
    of the partition; equal scores rank in the order of the partition.
    """

    values: dict[str, torch.Tensor]
    ranks: dict[str, torch.Tensor]

    @property
    def size(self) -> int:
        """Components in the partition."""
        return sum(part.numel() for part in self.values.values())

    def cut(self, kind: str, row: int | slice, density: float) -> torch.Tensor:
        """One row of a kind, zero outside the expert's best ``density`` share.

        Args:
            kind: a kind of the partition.
            row: the layer of a sliced kind, or the position of a whole tensor; or of several.
            density: in [0, 1].

        Returns:
            ``[components of the row]``.
        """
        keep = self.ranks[kind][row] < n_best(self.size, density)
        return (self.values[kind][row] * keep).reshape(-1)


def normalise(scores: Mapping[str, torch.Tensor]) -> Normalised:
    """Divide an expert's scores by the sum of its positive ones, and rank them.

    Args:
        scores: kind to scores of any shape; together the kinds are one partition.
    """
    wide = {kind: part.to(torch.float64) for kind, part in scores.items()}
    total = sum(float(part.clamp(min=0).sum()) for part in wide.values())
    values = {k: part / total if total > 0 else torch.zeros_like(part) for k, part in wide.items()}
    return Normalised(values, ranked(wide).ranks)  # tiny scores may be equal after the division


def ranked(wide: dict[str, torch.Tensor]) -> Normalised:
    """Values as they are, with their ranks."""
    flat = torch.cat([part.reshape(-1) for part in wide.values()])
    order = flat.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    pieces = torch.split(rank, [part.numel() for part in wide.values()])
    ranks = {k: piece.view(wide[k].shape) for k, piece in zip(wide, pieces, strict=True)}
    return Normalised(wide, ranks)


def n_best(size: int, density: float) -> int:
    """How many components the best ``density`` share is: at least one unless density is 0."""
    return max(1, int(density * size + 1e-9)) if density > 0 else 0


def component_gates(
    scores: torch.Tensor,
    weights: torch.Tensor,
    *,
    fusion: Fusion = "share",
    power: float = 0.5,
    scale: float = 1.0,
) -> torch.Tensor:
    """How much of each expert's task vector every component takes.

    With s the scores, w the weights and λ the scale, where s_e > 0 (and 0 elsewhere):

    - ``share``: λ w_e s_e^power / Σ s^power over the experts with a positive score
    - ``winner``: λ w_e for the expert with the highest score (the first of equals)
    - ``path``: λ w_e s_e, the scores being the gates of a fit
    - ``gate`` and ``topk``: λ w_e; the cut of ``topk`` to the best ``density`` share is made
      where scores are looked up (`Normalised.cut`), as it is under every fusion

    Args:
        scores: normalised scores (for ``path`` as they are), ``[experts, components]``.
        weights: ``[experts]``.
        fusion: the rule.
        power: flattens (below 1) or sharpens (above 1) the shares.
        scale: λ.

    Returns:
        Gates, float64 ``[experts, components]``.
    """
    scores = scores.to(torch.float64)
    positive = scores > 0
    if fusion == "share":
        # relative to the best expert: neither tiny scores nor large powers underflow to 0/0
        best = torch.where(positive, scores, 0.0).amax(0)
        best = torch.where(best > 0, best, 1.0)
        raised = torch.where(positive, (scores.clamp(min=0) / best) ** power, 0.0)
        share = raised / raised.sum(0).clamp(min=1.0)
    elif fusion == "winner":
        first = torch.arange(len(scores), device=scores.device)[:, None] == scores.argmax(0)
        share = (first & positive).to(torch.float64)
    elif fusion == "path":
        share = scores.clamp(min=0)
    else:
        share = positive.to(torch.float64)
    return scale * weights.to(torch.float64)[:, None] * share


def _row_blocks(tensor: torch.Tensor) -> Iterator[slice]:
    rows = tensor.shape[0]
    step = max(1, CHUNK // max(1, tensor[0].numel())) if rows else 1
    return (slice(start, start + step) for start in range(0, rows, step))


def delta_norm(base: torch.Tensor, expert: torch.Tensor) -> float:
    """Frobenius norm of the task vector, accumulated in float32 or wider.

    Args:
        base: any shape, on any device.
        expert: the same shape.
    """
    if base.ndim == 0:
        base, expert = base[None], expert[None]
    wide = torch.promote_types(torch.promote_types(base.dtype, expert.dtype), torch.float32)
    total = 0.0
    for rows in _row_blocks(base):
        delta = expert[rows].detach().to(wide) - base[rows].detach().to(wide)
        total += float(torch.linalg.vector_norm(delta)) ** 2
    return float(total**0.5)


def take_rows(parts: Sequence[torch.Tensor], rows: slice) -> list[torch.Tensor]:
    """Some rows of gates over a tensor, each ``[experts, ...]`` in a shape that broadcasts."""
    return [part if part.dim() < 2 or part.shape[1] == 1 else part[:, rows] for part in parts]


def fuse(
    base: torch.Tensor, experts: Sequence[torch.Tensor], gates: torch.Tensor, *more: torch.Tensor
) -> torch.Tensor:
    """W = B + Σ gate_e (E_e − B), accumulated in float32 (float64 for float64 weights).

    Where one gate is exactly 1 and the others are 0, W is that expert to the last bit, and where
    all are 0 it is the base: rounding in E − B reaches neither.

    Args:
        base: ``[...]``.
        experts: tensors like the base.
        gates: ``[experts, ...]``, each in a shape that broadcasts to the base.
        more: the same, to be added to the gates.

    Returns:
        The merged tensor in the base's dtype, on its device; the base or an expert itself where
        nothing else is mixed in.
    """
    if base.ndim == 0:
        return fuse(base[None], [expert[None] for expert in experts], gates[:, None])[0]
    if more:  # a sum of rows and columns is as large as the tensor: of a few rows at a time
        merged = torch.empty_like(base)
        for rows in _row_blocks(base):
            total = sum(take_rows((gates, *more), rows), torch.zeros((), dtype=gates.dtype))
            merged[rows] = fuse(base[rows], [expert[rows] for expert in experts], total)
        return merged
    alone = (gates == 1) & ((gates != 0).sum(0) == 1)
    for expert, mask in zip(experts, alone, strict=True):
        if mask.all():
            return expert.to(base.dtype)
    parts = [
        (expert, gate, mask)
        for expert, gate, mask in zip(experts, gates, alone, strict=True)
        if gate.any()
    ]
    if not parts:
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    merged = torch.empty_like(base)
    # asked of the masks before they go to the weights' device, where the answer takes a wait
    exact = [(expert, mask.to(base.device)) for expert, _, mask in parts if mask.any()]
    gated = [(expert, gate.to(base.device, wide)) for expert, gate, _ in parts]
    for rows in _row_blocks(base):
        start = base[rows].to(wide)
        block = start
        for expert, gate in gated:
            block = block.addcmul(expert[rows].to(wide) - start, _take(gate, rows))
        for expert, mask in exact:
            block = torch.where(_take(mask, rows), expert[rows].to(wide), block)
        merged[rows] = block.to(base.dtype)
    return merged


def _take(values: torch.Tensor, rows: slice) -> torch.Tensor:
    return values if values.shape[0] == 1 else values[rows]
