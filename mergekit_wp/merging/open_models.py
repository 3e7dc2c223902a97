"""The models of a recipe, opened as mergekit will open them, or refused.

Configs first (small), then the files that weights and adapters are in; only then mergekit merges
adapters into models, which takes their memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_wp.errors import UserError, option
from mergekit_wp.merging.recipe import Recipe, score_files
from mergekit_wp.models.lora import require_safetensors
from mergekit_wp.models.refusals import headers, refuse_pickles

#: what a mistake in a model or recipe raises in mergekit and transformers
MISTAKES = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
# from here on torch.load builds nothing but tensors unless told to
_SAFE_LOAD = (2, 6)


def open_models(recipe: Recipe, options: MergeOptions, *, only_to_plan: bool = False) -> None:
    """Fill mergekit's cache of opened models.

    Args:
        recipe: names them.
        options: of mergekit.
        only_to_plan: an adapter is not merged, its model stands in for both: for a plan, which
            reads the names of tensors. `forget_adapters` before anything else is read.

    Raises:
        UserError: a model cannot be read, is pickled, or does not fit its score file.
    """
    base, models = recipe.config.base_model, recipe.config.referenced_models()
    for model in models:
        if model.lora and not options.lora_merge_cache and not only_to_plan:
            raise UserError(
                f"model {model} has a LoRA: give {option('lora_merge_cache', 'FOLDER')} to merge it"
            )
    LoaderCache().setup(options)
    configs = {
        model: _reading(model, lambda m: m.config(trust_remote_code=options.trust_remote_code))
        for model in models
    }
    if recipe.is_weight_patching:
        for file in score_files(recipe):
            file.require_base(configs[base])
    for model in models:
        _refuse_pickles(model, options)
    for model in models:
        if model.lora and only_to_plan:
            bare = ModelReference(model=model.model)
            LoaderCache.loaders[model] = _reading(bare, LoaderCache().get)
        elif model.lora:
            _merge_adapter(model, options)
        loader = _reading(model, LoaderCache().get)
        if loader.index.is_safetensors:
            headers(loader.index, str(model))  # refuses missing and damaged files


def forget_adapters(recipe: Recipe) -> None:
    """Close models with adapters, for which others stood in."""
    for model in recipe.config.referenced_models():
        if model.lora:
            LoaderCache.loaders.pop(model, None)


def _refuse_pickles(model: ModelReference, options: MergeOptions) -> None:
    bare = ModelReference(model=model.model)
    folder = _reading(bare, lambda m: m.local_path(options.transformers_cache))
    if os.path.isdir(folder):
        lazily = options.lazy_unpickle and not model.lora and _loads_safely(folder)
        refuse_pickles(folder, str(bare), lazily=lazily)
    if model.lora:  # which peft reads
        require_safetensors(model.lora.path, model.lora.revision)


def _loads_safely(folder: str) -> bool:
    """Whether a pickle is read without being executed: mergekit lists a single one by torch."""
    single = os.path.isfile(os.path.join(folder, "pytorch_model.bin"))
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return not single or version >= _SAFE_LOAD


def _merge_adapter(model: ModelReference, options: MergeOptions) -> None:
    """Let mergekit merge an adapter into its cache, and leave no half of it there.

    mergekit takes any folder of that name for a finished model.
    """
    cached = _cached(model, options)
    existed = os.path.exists(cached)
    if existed and not any(name.endswith(".safetensors") for name in os.listdir(cached)):
        raise UserError(
            f"model {model}: {cached} holds no merged model, an earlier merge did not finish; "
            "remove that folder"
        )
    try:
        _reading(model, LoaderCache().get)
    except BaseException:
        if not existed:
            shutil.rmtree(cached, ignore_errors=True)
        raise


def _cached(model: ModelReference, options: MergeOptions) -> str:
    """Where mergekit keeps a model with its adapter merged."""
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    return os.path.join(options.lora_merge_cache, name)


def _reading(model: ModelReference, read: Callable[[ModelReference], Any]) -> Any:
    try:
        return read(model)
    except MISTAKES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {model} cannot be read: {reason}") from error
