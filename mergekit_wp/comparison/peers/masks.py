"""Merges by masks over single weights, without data and with."""

from __future__ import annotations

from typing import Any

import torch

from mergekit_wp.comparison.peers.finetune import mean_cross_entropy
from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting

#: what `kept_thresholds` are learned as
THRESHOLDS = "thresholds"


def consensus(one: OneTensor, setting: Setting) -> torch.Tensor:
    """Consensus TA (Wang et al., arXiv 2405.07813).

    A weight is an expert's own where |τ_e| > m·|τ − τ_e|, τ the sum of all task vectors and m the
    ``mask_lambda``; the sum, times ``lambda``, stays where at least ``k`` experts claim it
    (`tallmask_utils.py` of nik-dim/tall_masks; `consensus.py` of uiuctml/MergeBench).
    """
    total = one.vectors.sum(0)
    own = one.vectors.abs() > float(setting["mask_lambda"]) * (total - one.vectors).abs()
    return float(setting["lambda"]) * total * (own.sum(0) >= int(setting["k"]))


def stitched(one: OneTensor, _setting: Setting) -> torch.Tensor:
    """Localize-and-Stitch without data (He et al., arXiv 2408.13656), after `kept_thresholds`.

    Each expert keeps its weights with the largest |τ_e|; where several do, their mean counts
    (`localize_utils.py` of yifei-he/Localize-and-Stitch). Embeddings stay the base's, as there and
    in uiuctml/MergeBench.
    """
    if not one.matrix and one.vectors.dim() > 2:  # an embedding, or the head
        return torch.zeros_like(one.base)
    thresholds = one.learned[THRESHOLDS].to(one.vectors.device)
    kept = one.vectors.abs() >= thresholds.view(-1, *[1] * one.base.dim())
    kept &= one.vectors != 0
    return averaged_where(one.vectors, kept)


def stitched_by_masks(one: OneTensor, _setting: Setting) -> torch.Tensor:
    """Localize-and-Stitch after `trained_masks`."""
    if one.name not in one.learned:
        return torch.zeros_like(one.base)
    return averaged_where(one.vectors, one.learned[one.name].to(one.vectors.device))


def trained_masks(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """Localize-and-Stitch (He et al., arXiv 2408.13656): which weights of an expert to keep.

    A mask S begins at ±``bias``, + where `kept_thresholds` keeps a weight; in each of ``epochs``
    it goes ``rate`` times down the gradient, summed over batches of ``prompts_a_step`` prompts, of
    the cross-entropy of the expert's answers under B + σ(S)·Δ. What ends above 0 is kept
    (`localize_utils.py: train_graft` of yifei-he/Localize-and-Stitch; no L1 term, bias and rate as
    uiuctml/MergeBench has them for language models). Masks of one expert are in memory at a time.

    Returns:
        ``[experts, *shape]``, true where kept, by tensor; embeddings and the head are left out.
    """
    prompted, rate = sources.prompted, float(setting["rate"])
    thresholds = kept_thresholds(sources, setting)[THRESHOLDS]
    names = _localised(sources)
    model = prompted.model
    parameters = dict(model.model.named_parameters())
    found = {n: torch.zeros((len(sources.experts), *sources.shape(n))).bool() for n in names}
    epochs = int(setting["epochs"])
    for e in range(len(sources.experts)):
        masks = {}
        for name in names:
            kept = sources.vectors(name)[1][e].abs() >= float(thresholds[e])
            masks[name] = float(setting["bias"]) * (2.0 * kept - 1)

        def write(name: str, out: torch.Tensor, e: int = e, masks: Any = masks) -> None:
            base, vectors = sources.vectors(name)
            out.copy_(base + torch.sigmoid(masks[name]) * vectors[e] if name in masks else base)

        for _ in range(epochs):
            model.fill(write)
            model.model.requires_grad_(True)
            every = prompted.batches(e, int(setting["prompts_a_step"]))
            prompted.descend(every, [mean_cross_entropy] * len(every))
            model.model.requires_grad_(False)
            for name, mask in masks.items():
                gradient = parameters[name].grad
                if gradient is not None:
                    slope = torch.sigmoid(mask) * (1 - torch.sigmoid(mask))
                    mask -= rate * gradient * sources.vectors(name)[1][e] * slope
            model.model.zero_grad()
            sources.spent(steps=1, passes=sum(batch.size for batch in every))
        for name, mask in masks.items():
            found[name][e] = (mask > 0).cpu()
    return found


def averaged_where(vectors: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mean of task vectors over the experts that keep a weight, 0 where none does.

    Args:
        vectors: ``[experts, *shape]``.
        kept: which, of the same shape.
    """
    return (vectors * kept).sum(0) / kept.sum(0).clamp_min(1)


def kept_thresholds(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """Magnitudes that the part ``sparsity`` of each expert's task vector reaches, ``[experts]``.

    Found over all tensors but the embeddings, in two passes with one tensor in memory: the bits of
    positive floats are ordered as the floats are, so their upper halves are counted first.
    """
    names = _localised(sources)
    total = sum(sources.size(name) for name in names)
    wanted = max(1, int(float(setting["sparsity"]) * total))
    n = len(sources.experts)
    upper = torch.zeros((n, 2**15), dtype=torch.long)
    for name in names:
        for e, bits in enumerate(_bits(sources, name)):
            upper[e] += torch.bincount(bits >> 16, minlength=2**15)
    above = upper.flip(1).cumsum(1).flip(1)  # how many are in this bucket or a higher one
    bucket = (above >= wanted).sum(1) - 1
    lower = torch.zeros((n, 2**16), dtype=torch.long)
    for name in names:
        for e, bits in enumerate(_bits(sources, name)):
            inside = bits[bits >> 16 == bucket[e]]
            lower[e] += torch.bincount(inside & 0xFFFF, minlength=2**16)
    higher = above.gather(1, bucket[:, None]) - upper.gather(1, bucket[:, None])
    reach = lower.flip(1).cumsum(1).flip(1) + higher
    last = (reach >= wanted).sum(1) - 1
    found = ((bucket << 16) | last).to(torch.int32).view(torch.float32)
    return {THRESHOLDS: found}


def _localised(sources: Sources) -> list[str]:
    """Tensors whose weights are chosen among: all but embeddings and the head."""
    return [n for n in sources.names if n in sources.matrices or len(sources.shape(n)) < 2]


def _bits(sources: Sources, name: str) -> torch.Tensor:
    """Magnitudes of task vectors as integers, ``[experts, numbers]``."""
    _, vectors = sources.vectors(name)
    return vectors.abs().flatten(1).cpu().contiguous().view(torch.int32).long()
