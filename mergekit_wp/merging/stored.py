"""Tensors as their checkpoints store them, before a merge rounds or rearranges them.

mergekit hands a method tensors already cast to the recipe's dtype, and embeddings with their rows
in the order of the merged tokenizer, some dropped, some borrowed from another model. Whether they
are of the checkpoints that a score file was made from shows only in what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import TensorEntry

from mergekit_wp.errors import UserError
from mergekit_wp.merging.host import config_of


def stored_pair(
    names: Sequence[str],
    base: TensorEntry,
    expert: TensorEntry,
    token_axis: int | None,
    *,
    shown_as: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stored tensors of which two given ones were made.

    Args:
        names: of the parameter; the first that a checkpoint stores counts.
        base: of the base.
        expert: of the expert.
        token_axis: the axis that stands for tokens, if one does. Along it the given tensors may be
            rearranged, and of the stored ones what both models have is compared; else the given
            ones must be the stored ones but for rounding.
        shown_as: what errors call the given tensor and the expert.

    Returns:
        None where they cannot be found.

    Raises:
        UserError: the given tensors are those of another layer.
    """
    found = [_stored(names, side) for side in (base, expert)]
    ours, theirs = found
    if ours is None or theirs is None:
        return None
    if token_axis is not None:
        common = min(ours.shape[token_axis], theirs.shape[token_axis])
        ours, theirs = (side.narrow(token_axis, 0, common) for side in (ours, theirs))
    elif not (_rounded(base.tensor, ours) and _rounded(expert.tensor, theirs)):
        raise UserError(
            f"{shown_as}: its checkpoint stores another tensor under that name: these are shifted "
            "layers, where other scores apply; weight_patching needs layers to keep their numbers"
        )
    return (ours, theirs) if ours.shape == theirs.shape else None


def _rounded(given: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a tensor is the stored one, cast."""
    return torch.equal(stored.to(device=given.device, dtype=given.dtype), given)


def _stored(names: Sequence[str], given: TensorEntry) -> torch.Tensor | None:
    # imported here, as mergekit may import this package while it is half imported itself
    from mergekit.io.tasks import LoaderCache

    from mergekit_wp.models.parameter_names import StoredNames

    model, config = given.id, config_of(given.id)
    loader = LoaderCache.loaders.get(model) if isinstance(model, ModelReference) else None
    if loader is None or config is None:
        return None
    stored = StoredNames(config, dict.fromkeys(loader.index.tensor_paths, ((), "")))
    name = next((name for name in names if stored.has(name)), None)
    return None if name is None else stored.read(name, loader.get_tensor)
