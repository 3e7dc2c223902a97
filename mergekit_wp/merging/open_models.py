"""The models of a recipe, opened as mergekit will open them, or refused.

Configs first (small), then the files that weights and adapters are in; only then mergekit merges
adapters into models, which takes their memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_wp.errors import UserError
from mergekit_wp.merging.model_references import replaced
from mergekit_wp.merging.recipe import Recipe
from mergekit_wp.models import hub
from mergekit_wp.models.load import MISTAKEN_CONFIG
from mergekit_wp.models.lora import require_safetensors
from mergekit_wp.models.refusals import (
    headers,
    refuse_adapter_alone,
    refuse_pickles,
    refuse_stand_ins,
)

#: what a mistake in a model or recipe raises in mergekit and transformers
MISTAKES = (*MISTAKEN_CONFIG, SafetensorError)


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
    LoaderCache().setup(options)
    for model in models:
        _refuse_stand_ins(model)
    configs = {
        model: _reading(model, lambda m: m.config(trust_remote_code=options.trust_remote_code))
        for model in models
    }
    if recipe.is_weight_patching:
        for file in recipe.score_files:
            file.require_base(configs[base])
    for model in models:
        _refuse_pickles(model, options)
    for model in models:
        if model.lora and only_to_plan:
            LoaderCache.loaders[model] = _opened(ModelReference(model=model.model), options)
        elif model.lora:
            _merge_adapter(model, options)
        elif model not in LoaderCache.loaders:
            LoaderCache.loaders[model] = _opened(model, options)
        loader = _reading(model, LoaderCache().get)
        if loader.index.is_safetensors:
            headers(loader.index, str(model))  # refuses missing and damaged files


def _opened(model: ModelReference, options: MergeOptions) -> Any:
    here = snapshot(model, options)
    return _reading(model, lambda _: LoaderCache().get(here))


def snapshot(model: ModelReference, options: MergeOptions) -> ModelReference:
    """A model of the Hub as the folder it has in the cache; any other as it is.

    mergekit asks the Hub for a list of the files of every model, and fails without a network.

    Raises:
        UserError: it cannot be fetched.
    """
    if model.lora is not None or os.path.exists(model.model.path):
        return model
    cache = options.transformers_cache
    folder = _reading(
        model,
        lambda m: hub.checkpoint(m.model.path, m.model.revision, cache=cache, pickles=True),
    )
    refuse_stand_ins(folder, f"model {model}")
    place = ModelPath.model_construct(path=str(folder), revision=None)
    return ModelReference(model=place, override_architecture=model.override_architecture)


def with_snapshots(config: MergeConfiguration, options: MergeOptions) -> MergeConfiguration:
    """A copy of a recipe in which models of the Hub are folders, for mergekit to run.

    Raises:
        UserError: a model cannot be fetched.
    """
    places = {model: snapshot(model, options) for model in config.referenced_models()}
    return replaced(config, lambda model: places.get(model, model))


@contextmanager
def place_for_adapters(
    models: Iterable[ModelReference], options: MergeOptions, folder: Path
) -> Iterator[MergeOptions]:
    """Options by which mergekit merges adapters into their models, in a folder while they last.

    Args:
        models: those of a merge.
        options: of mergekit; the same are given back where no model has an adapter, or they name a
            place. Else adapters are merged in float32, where no change drowns in rounding.
        folder: to be made; removed afterwards.
    """
    adapted = [model for model in models if model.lora is not None]
    if not adapted or options.lora_merge_cache:
        yield options
        return
    _forget(adapted)
    try:
        dtype = options.lora_merge_dtype or "float32"
        yield options.model_copy(
            update={"lora_merge_cache": str(folder), "lora_merge_dtype": dtype}
        )
    finally:
        _forget(adapted)
        shutil.rmtree(folder, ignore_errors=True)


def merge_adapters(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Let mergekit merge adapters into its cache, before anything else is done.

    Raises:
        UserError: one cannot be read.
    """
    LoaderCache().setup(options)
    for model in models:
        if model.lora is not None:
            require_safetensors(model.lora.path, model.lora.revision)
            _merge_adapter(model, options)


def _refuse_stand_ins(model: ModelReference) -> None:
    """Refuse folders without the files they should have, before a config is read from them."""
    if os.path.isdir(model.model.path):
        refuse_stand_ins(model.model.path, f"model {model}")
        refuse_adapter_alone(model.model.path, str(model))


def forget_adapters(recipe: Recipe) -> None:
    """Close models with adapters, for which others stood in."""
    _forget(recipe.config.referenced_models())


def _forget(models: Iterable[ModelReference]) -> None:
    for model in models:
        if model.lora is not None:
            LoaderCache.loaders.pop(model, None)


def _refuse_pickles(model: ModelReference, options: MergeOptions) -> None:
    bare = ModelReference(model=model.model)
    folder = snapshot(bare, options).model.path
    if os.path.isdir(folder):
        refuse_pickles(folder, str(bare), lazily=options.lazy_unpickle and not model.lora)
    if model.lora:  # which peft reads
        require_safetensors(model.lora.path, model.lora.revision)


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
        raise UserError(f"model {model} cannot be read: {hub.reason(error)}") from error
