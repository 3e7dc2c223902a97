"""Activation-Informed Merging (Nobari et al., arXiv 2502.02421), which post-processes a merge.

With s the mean absolute input of each input channel of a linear layer, measured in the base over
calibration prompts and scaled to a maximum of 1, and δ the merge's difference from the base,

    δ' = δ (1 − s (1 − ω))

so that channels the base uses most keep most of the base's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mergekit_wp.errors import UserError
from mergekit_wp.prompts import Prompt, encode_prompt, encode_response

#: in the range that the paper explores, 0.2 to 0.6
DEFAULT_OMEGA = 0.4


@torch.no_grad()
def activation_importance(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int
) -> dict[str, torch.Tensor]:
    """Mean |input| per input channel of every linear layer, scaled to a maximum of 1.

    Args:
        model: the base, a causal LM of transformers.
        tokenizer: its tokenizer.
        prompts: calibration texts: each prompt, and its response where one is given.
        batch_size: prompts at once.

    Returns:
        ``[in_features]`` by weight name. A head that is tied to the embedding is not listed: its
        weight is the embedding's, which has no input channels.

    Raises:
        UserError: no prompts.
    """
    if not prompts:
        raise UserError("AIM needs calibration prompts, and the file holds none")
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sums: dict[str, torch.Tensor] = {}
    real = torch.zeros(0, dtype=torch.bool)  # which positions are no padding

    def hook(name: str) -> Any:
        def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found = args[0][real].abs().double().sum(0).cpu()
            sums[name] = sums[name] + found if name in sums else found

        return before

    handles = [
        module.register_forward_pre_hook(hook(f"{path}.weight"))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tied
    ]
    encoded = [
        encode_prompt(tokenizer, p.prompt)
        + ([] if p.response is None else encode_response(tokenizer, p.response))
        for p in prompts
    ]
    encoded.sort(key=len)
    try:
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start : start + batch_size]
            width = max(map(len, rows))
            # padding is on the right, where causal attention never looks from a real position
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=model.device)
            lengths = torch.tensor([len(r) for r in rows], device=model.device)
            real = torch.arange(width, device=model.device) < lengths[:, None]
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (total / total.max()).float() if total.max() > 0 else total.float()
        for name, total in sums.items()
    }


def apply_aim(
    base: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    omega: float,
) -> dict[str, torch.Tensor]:
    """The merge with the weights of important input channels drawn back to the base.

    Args:
        base: weights of the base by name.
        merged: weights of the merge; those without importance (embeddings, norms, biases) stay.
        importance: from `activation_importance`.
        omega: 1 changes nothing, 0 keeps the base in the most important channel.

    Returns:
        New tensors in the merge's dtypes, computed in float32.

    Raises:
        UserError: omega outside [0, 1], or weights that do not fit each other.
    """
    if not 0 <= omega <= 1:
        raise UserError(f"omega must be from 0 to 1, not {omega}")
    if missing := [name for name in importance if name not in merged or name not in base]:
        raise UserError(f"the merge and its base do not both have {missing[0]}; is it their base?")
    result = dict(merged)
    for name, s in importance.items():
        ours, theirs = base[name], merged[name]
        if ours.shape != theirs.shape or ours.shape[-1] != len(s):
            raise UserError(
                f"{name} is {list(theirs.shape)} in the merge and {list(ours.shape)} in the base"
            )
        start = ours.to(theirs.device, torch.float32)
        delta = theirs.float() - start
        kept = 1 - s.to(theirs.device) * (1 - omega)
        result[name] = (start + delta * kept).to(theirs.dtype)
    return result
