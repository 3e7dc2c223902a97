"""One coefficient for every tensor of every expert, learned by gradient on the experts' prompts.

W = B + Σ_e c_e·Δ_e for each tensor, and ∂L/∂c_e = ⟨∂L/∂W, Δ_e⟩. In memory are base and differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mergekit_wp.comparison.peers.peer import OneTensor
from mergekit_wp.comparison.peers.prompted import AnswerStates, Loss, answer_logits
from mergekit_wp.comparison.peers.sources import Sources
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.criteria import per_prompt_mean
from mergekit_wp.engine.decoder import Decoder, hooked
from mergekit_wp.prompts import PromptBatch

#: Expert Merging's temperature, weight of hidden states, and weight of staying near the start
TEMPERATURE, OF_HIDDEN, PULL = 3.0, 0.1, 0.1
#: the largest norm of its gradient
CLIP = 1.0


def weighted(one: OneTensor, _setting: Setting) -> torch.Tensor:
    """Σ_e c_e·Δ_e with the coefficients that were learned."""
    if one.name not in one.learned:
        return torch.zeros_like(one.base)
    found: torch.Tensor = torch.tensordot(one.learned[one.name].to(one.vectors), one.vectors, 1)
    return found


def ada_merging(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """Layer-wise AdaMerging (Yang et al., arXiv 2310.02575): coefficients of least entropy.

    Every tensor of every expert has its own, all begin at ``start``, and Adam follows the sum over
    experts of the mean entropy of what the merge predicts on their prompts, as
    `layer_wise_adamerging.py` of FusionBench does for classes. What is predicted here are the next
    tokens at the positions of the experts' answers.
    """
    losses = [mean_entropy] * len(sources.experts)
    return learned_coefficients(sources, setting, sources.names, losses)


def mean_entropy(decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
    """Mean over prompts of the mean entropy at their answers' positions, in nats."""
    logp = torch.log_softmax(answer_logits(decoder, batch), -1)
    return per_prompt_mean(-(logp.exp() * logp).sum(-1), batch).mean()


def expert_merging(sources: Sources, setting: Setting) -> dict[str, torch.Tensor]:
    """Expert Merging (Zhang et al., arXiv 2509.25712): coefficients by distillation.

    The weights of linear layers have coefficients between 0 and 1, the sigmoids of what is learned;
    everything else stays the base's, and gradients are clipped at `CLIP`. The loss on an expert's
    prompts is T²·KL to its predictions at `TEMPERATURE`, plus `OF_HIDDEN` times the
    mean squared difference from its hidden states, plus `PULL` times the mean distance of the
    coefficients from where they began (`expert_merging_base.py` of Littleor/ExpertMerging). Here
    both differences are taken at the answers' positions, and hidden states of all layers count;
    its learning rate's schedule and its chunks (Expert Merging++) are left out.
    """
    prompted = sources.prompted
    losses = []
    for expert in range(len(sources.experts)):
        prompted.become(expert)
        teacher = Teacher.of(prompted.model.model, prompted.batches(expert, prompted.at_once.size))
        losses.append(teacher.loss)
    sources.spent(passes=prompted.count)
    names = [name for name in sources.names if name in sources.matrices]
    return learned_coefficients(sources, setting, names, losses, bounded=True, pull=PULL, clip=CLIP)


@dataclass(frozen=True)
class Teacher:
    """What an expert computes at its answers' positions, by the number of the prompt.

    Attributes:
        logits: ``[P, vocabulary]``.
        hidden: of every layer, ``[P, layers, hidden]``.
    """

    logits: Mapping[int, torch.Tensor]
    hidden: Mapping[int, torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, every: Sequence[PromptBatch]) -> Teacher:
        """Of a model as it is now."""
        logits, hidden = {}, {}
        for batch in every:
            at_answers = AnswerStates.of(Decoder(model), batch)
            for place, member in enumerate(batch.members.tolist()):
                own = batch.owners == place
                logits[member] = at_answers.logits[own].cpu()
                hidden[member] = at_answers.hidden[own].cpu()
        return cls(logits, hidden)

    def loss(self, decoder: Decoder, batch: PromptBatch) -> torch.Tensor:
        """Mean over prompts of how far a model is from the expert."""
        student = AnswerStates.of(decoder, batch)
        members = batch.members.tolist()
        logits = torch.cat([self.logits[m] for m in members]).to(student.logits)
        hidden = torch.cat([self.hidden[m] for m in members]).to(student.hidden)
        theirs = torch.log_softmax(logits / TEMPERATURE, -1)
        ours = torch.log_softmax(student.logits / TEMPERATURE, -1)
        divergence = TEMPERATURE**2 * (theirs.exp() * (theirs - ours)).sum(-1)
        distance = (student.hidden - hidden).square().mean((-1, -2))
        return per_prompt_mean(divergence + OF_HIDDEN * distance, batch).mean()


def learned_coefficients(
    sources: Sources,
    setting: Setting,
    names: Sequence[str],
    losses: Sequence[Loss],
    *,
    bounded: bool = False,
    pull: float = 0.0,
    clip: float = math.inf,
) -> dict[str, torch.Tensor]:
    """Adam's way down a sum of losses.

    Args:
        sources: what is merged.
        setting: ``start`` of all coefficients, ``rate`` of Adam, ``steps``, and ``prompts_a_step``
            of each expert.
        names: of the tensors that have coefficients.
        losses: one for each expert, on its prompts.
        bounded: Adam changes their logits, so that they stay between 0 and 1.
        pull: weight of the mean, times the number of experts, of how far coefficients went.
        clip: the largest norm of all gradients.

    Returns:
        ``[experts]`` by tensor.
    """
    prompted, count, start = sources.prompted, int(setting["steps"]), float(setting["start"])
    model, n = prompted.model, len(sources.experts)
    tensors = {name: sources.vectors(name) for name in names}
    began = torch.full((n,), start)
    raw = {name: torch.nn.Parameter(began.logit() if bounded else began.clone()) for name in names}
    gradients = {name: torch.zeros(n) for name in names}
    parameters = dict(model.model.named_parameters())
    adam = torch.optim.Adam(raw.values(), lr=float(setting["rate"]))

    def coefficients(name: str) -> torch.Tensor:
        value = raw[name].detach()
        return value.sigmoid() if bounded else value

    def collect(name: str) -> Any:
        def after(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            flat = tensors[name][1].flatten(1)
            gradients[name] += (flat @ parameter.grad.flatten().to(flat)).cpu()
            parameter.grad = None  # a tensor's gradient is in memory at a time

        return after

    def forget() -> None:
        for gradient in gradients.values():
            gradient.zero_()

    def write(name: str, out: torch.Tensor) -> None:
        if name not in raw:
            sources.base.read(name, out)
            return
        base, vectors = tensors[name]
        out.copy_(base + torch.tensordot(coefficients(name).to(vectors), vectors, 1))

    model.fill(write)
    for name in names:
        parameters[name].requires_grad_(True)
    handles = [parameters[n].register_post_accumulate_grad_hook(collect(n)) for n in names]
    try:
        with hooked(handles):
            for chosen in prompted.steps(count, int(setting["prompts_a_step"])):
                prompted.descend(chosen, losses, forget)
                for name, parameter in raw.items():
                    now = coefficients(name)
                    away = torch.sign(now - start) / len(names)
                    slope = now * (1 - now) if bounded else 1.0
                    parameter.grad = (gradients[name] + pull * away) * slope
                torch.nn.utils.clip_grad_norm_(raw.values(), clip)
                adam.step()
                model.fill(write)
                sources.spent(steps=1, passes=sum(batch.size for batch in chosen))
    finally:
        model.model.requires_grad_(False)
    return {name: coefficients(name) for name in names}
