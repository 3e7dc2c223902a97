"""Joint fine-tuning of the base on all experts' answers: no merge, but what a merge is up against.

With the experts' prompts and answers at hand one can train the base on them instead of merging.
With as many steps of as many prompts as a fit it says how much of the answers the data alone gives.
"""

from __future__ import annotations

import torch

from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.peers.prompted import answer_logits
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.criteria import per_prompt_mean
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.prompts import PromptBatch


def tuned(one: OneTensor, _setting: Setting) -> torch.Tensor:
    """What training changed."""
    return one.learned[one.name].to(one.base) - one.base


def fine_tuned(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """AdamW from the base down the mean cross-entropy of the experts' answers.

    All weights are trained, at ``rate`` after a tenth of the ``steps`` and falling evenly to 0,
    without weight decay, with ``prompts_a_step`` prompts of each expert in one step. Adam takes two
    more models of memory, the gradients a third.

    Returns:
        The weights by tensor.
    """
    prompted, count = sources.prompted, int(setting["steps"])
    model = prompted.model
    model.fill(sources.base.read)
    parameters = dict(model.model.named_parameters())
    adam = torch.optim.AdamW(
        parameters.values(), lr=float(setting["rate"]), betas=(0.9, 0.95), weight_decay=0
    )
    warm = max(1, count // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / warm, (count - step) / max(1, count - warm), 1.0)
    )
    model.model.requires_grad_(True)
    losses = [mean_cross_entropy] * len(prompted.members)
    try:
        for chosen in prompted.steps(count, int(setting["prompts_a_step"])):
            prompted.descend(chosen, losses)
            adam.step()
            scheduler.step()
            sources.spent(steps=1, passes=sum(batch.size for batch in chosen))
    finally:
        model.model.requires_grad_(False)
        model.model.zero_grad()
    return {name: parameters[name].detach().cpu() for name in sources.names}


def mean_cross_entropy(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    """Mean over prompts of the mean cross-entropy of their answers' tokens, in nats."""
    loss = torch.nn.functional.cross_entropy(
        answer_logits(decoder, batch), batch.targets, reduction="none"
    )
    return per_prompt_mean(loss, batch).mean()
