"""Fisher merging (Matena and Raffel, arXiv 2111.09832): a mean, the surer expert weighing more."""

from __future__ import annotations

import torch

from mergekit_wp.comparison.peers.peer import Learned, OneTensor
from mergekit_wp.comparison.peers.prompted import answer_logits
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.criteria import per_prompt_mean
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.prompts import PromptBatch

#: L2 norms of the experts' Fisher information, ``[experts]``
NORMS = "norms"


def fisher_information(sources: Sources, _setting: Setting) -> dict[str, torch.Tensor]:
    """The diagonal of every expert's Fisher information on its own prompts.

    F = mean over prompts of (∇ log p(answer | prompt))², the answer the expert's own greedy one:
    the "hard" variant of uiuctml/MergeBench over whole answers, one prompt at a time. It is as
    large as a model for every expert.

    Returns:
        ``[experts, *shape]`` by tensor, and `NORMS`.
    """
    prompted = sources.prompted
    model, n = prompted.model, len(sources.experts)
    parameters = {name: dict(model.model.named_parameters())[name] for name in sources.names}
    found = {name: torch.zeros((n, *p.shape)) for name, p in parameters.items()}
    model.model.requires_grad_(True)
    try:
        for expert in range(n):
            prompted.become(expert)
            every = prompted.batches(expert, 1)
            for batch in every:
                prompted.descend([batch], [log_likelihood])
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        found[name][expert] += parameter.grad.float().square().cpu() / len(every)
                sources.spent(passes=1)
    finally:
        model.model.requires_grad_(False)
        model.model.zero_grad()
    squares = [fisher.flatten(1).double().square().sum(1) for fisher in found.values()]
    return found | {NORMS: torch.stack(squares).sum(0).sqrt().float()}


def log_likelihood(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    """Mean over prompts of the log-probability of the whole answer."""
    logp = torch.log_softmax(answer_logits(decoder, batch), -1)
    picked = logp.gather(-1, batch.targets[:, None]).squeeze(-1)
    lengths = torch.bincount(batch.owners, minlength=batch.size)
    return (per_prompt_mean(picked, batch) * lengths).mean()


def fisher_weighted(one: OneTensor, setting: Setting) -> torch.Tensor:
    """Σ_e F_e·Δ_e / Σ_e F_e with ``floor`` added to each F_e.

    With ``normalize`` an expert's F counts divided by its norm over all tensors
    (`fisher_merging.py: merging_with_fisher_weights` of FusionBench, after yule-BUAA/MergeLM).
    """
    floor = float(setting["floor"])
    weights = one.learned[one.name].to(one.vectors) + floor
    if setting["normalize"]:
        weights = weights / (_norms(one.learned, weights, floor))
    return (weights * one.vectors).sum(0) / weights.sum(0)


def _norms(learned: Learned, like: torch.Tensor, floor: float) -> torch.Tensor:
    return (learned[NORMS].to(like) + floor).view(-1, *[1] * (like.dim() - 1))
