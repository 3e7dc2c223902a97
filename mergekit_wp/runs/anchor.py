"""The vector anchor: a direction in the residual stream and the layer to read it at.

With contrasts (the same request without the instruction) the direction is the difference of
means, expert with instruction minus expert without; without contrasts it is expert minus base,
the matched-checkpoint anchor. The layer is chosen by how well the projection
separates on held-out prompts (each is projected on the direction of the others): both with from
without the instruction, else the direction does not stand for it, and expert from base, else
recovery along it means nothing. The weaker of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_wp.criteria import AnchorDirection
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.manifest import Anchor

#: fewest prompts from which a layer can be chosen on held-out ones
MIN_HELD_OUT = 2


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
                f"{option('anchor_layer', 'auto')} needs at least {MIN_HELD_OUT} prompts to "
                f"choose on held-out ones, not {n}; give more prompts or set the layer"
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
