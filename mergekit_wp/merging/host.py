"""What mergekit knows of the models it merges: configs, opened files, the tensors it writes.

It hands a method tensors already cast to the recipe's dtype, and embeddings with their rows in the
order of the merged tokenizer, some dropped, some borrowed from another model. Whether they are of
the checkpoints that a score file was made from shows only in what is stored.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Collection, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import TensorEntry

from mergekit_wp.architectures import text_config
from mergekit_wp.errors import UserError, option
from mergekit_wp.models.model_names import refuse_twice
from mergekit_wp.models.refusals import refuse_quantised, refuse_quantised_weights


def shown(name: str, model: Hashable) -> str:
    """What errors call a tensor; mergekit reads a model with an adapter from its cache."""
    adapter = isinstance(model, ModelReference) and model.lora is not None
    return f"tensor {name} of {model}" + (
        f" (as merged in {option('lora_merge_cache')})" if adapter else ""
    )


def refuse_unusable(input_ids: Sequence[Hashable], base_id: Hashable | None) -> None:
    """Refuse models that are listed twice, and quantised ones.

    Raises:
        UserError: names the model.
    """
    from mergekit.io.tasks import LoaderCache

    models = [model for model in input_ids if isinstance(model, ModelReference)]
    base = base_id if isinstance(base_id, ModelReference) else None
    refuse_twice(models, base)
    for model in models:
        if (config := config_of(model)) is not None:
            refuse_quantised(config, str(model))
        loader = LoaderCache.loaders.get(model)  # mergekit opens them before it plans
        if loader is not None and loader.index.is_safetensors:
            refuse_quantised_weights(loader.index, str(model))


def unwritten(scored: Iterable[str], planned: Collection[str]) -> list[str]:
    """Scored tensors that a merge would lose.

    mergekit writes what its own architecture definition lists; that of Llama knows no biases, for
    instance. Layers that a recipe leaves out altogether are the recipe's will, not a loss.

    Args:
        scored: tensor names of score files.
        planned: names of the tensors that will be written.
    """
    layers = {_layer_of(name) for name in planned}
    return [name for name in scored if name not in planned and _layer_of(name) in layers]


def _layer_of(name: str) -> str | None:
    match = re.search(r"\.([0-9]+)\.", name)
    return match[1] if match else None


def is_tied(base_id: Hashable | None) -> bool | None:
    """Whether the base's output head is its embedding; None when its config is not known."""
    config = config_of(base_id)
    return None if config is None else bool(text_config(config).tie_word_embeddings)


def config_of(model: Hashable | None) -> Any | None:
    """A model's transformers config, None in a direct call or for a bare weights file."""
    if not isinstance(model, ModelReference) or os.path.isfile(model.model.path):
        return None
    try:
        stamp = os.stat(os.path.join(model.model.path, "config.json")).st_mtime_ns
    except OSError:
        stamp = None
    return _config(model, stamp)


@lru_cache(maxsize=16)
def _config(model: ModelReference, stamp: int | None) -> Any:
    # imported here, as mergekit may import this module while it is half imported itself; filled by
    # the planner's thread, whose loader cache knows the command's options
    from mergekit.io.tasks import LoaderCache

    return model.config(trust_remote_code=LoaderCache().trust_remote_code)


def raised_by_mergekit(error: Exception) -> bool:
    """Whether mergekit called what failed, and not we: our method runs within it."""
    packages = [
        str(frame.f_globals["__name__"]).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    ours_or_its = [name for name in packages if name in ("mergekit", "mergekit_wp")]
    return ours_or_its[-1:] == ["mergekit"]


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
