"""A recipe held against its models, before the first hour of merging.

Configs first (small), then weights are opened, then mergekit's own planner runs dry, which
validates every parameter for every tensor; last, a few tensors of every expert are read and
compared with its score file. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors import SafetensorError, safe_open

from mergekit_wp.checkpoints import refuse_pickles
from mergekit_wp.errors import UserError
from mergekit_wp.expert_scores import ExpertScores, unwritten
from mergekit_wp.method import is_tied
from mergekit_wp.planned import planned_gates, planned_source
from mergekit_wp.recipe import Recipe, one_line, score_files

#: Tensors per expert that are read before the merge: the smallest, and evenly spaced layer tensors.
SMALLEST, SPACED = 3, 2
_MISTAKES = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def check(recipe: Recipe, options: MergeOptions) -> list[ExecuteMergeMethodTask]:
    """Refuse a recipe that would fail, or merge something else than meant.

    Returns:
        mergekit's plan: one task for every tensor that the merge will write.

    Raises:
        UserError: one sentence naming the culprit.
    """
    tasks = plan(recipe, options)
    if recipe.is_weight_patching:
        _refuse_shifted_layers(tasks)
        _refuse_missing_tensors(tasks)
        _refuse_lost_tensors(recipe, tasks)
        for task in tasks:
            planned_gates(task)  # refuses score files and guards that do not fit
        _sample(tasks)
    return tasks


def plan(recipe: Recipe, options: MergeOptions) -> list[ExecuteMergeMethodTask]:
    """Mergekit's plan of a recipe, every parameter validated for every tensor; reads no weights.

    Raises:
        UserError: a model cannot be read, or a parameter is wrong.
    """
    _open_models(recipe, options)
    return _dry_plan(recipe, options)


def _open_models(recipe: Recipe, options: MergeOptions) -> None:
    base, models = recipe.config.base_model, recipe.config.referenced_models()
    for model in models:
        if model.lora and not options.lora_merge_cache:
            raise UserError(f"model {model} has a LoRA: give --lora-merge-cache FOLDER to merge it")
    LoaderCache().setup(options)
    configs = {
        model: _reading(model, lambda m: m.config(trust_remote_code=options.trust_remote_code))
        for model in models
    }
    if recipe.is_weight_patching:
        for file in score_files(recipe):
            file.require_base(configs[base])
        for model in models:
            bare = ModelReference(model=model.model)
            folder = _reading(bare, lambda m: m.local_path(options.transformers_cache))
            if os.path.isdir(folder):
                refuse_pickles(folder, str(bare), lazily=options.lazy_unpickle)
    for model in models:
        _reading(model, LoaderCache().get)


def _reading(model: ModelReference, read: Callable[[ModelReference], Any]) -> Any:
    try:
        return read(model)
    except _MISTAKES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {model} cannot be read: {reason}") from error


def _dry_plan(recipe: Recipe, options: MergeOptions) -> list[ExecuteMergeMethodTask]:
    """Plan as mergekit will: that validates every parameter for every tensor."""
    config = recipe.config.model_copy(deep=True)
    shape_of = config.base_model or config.referenced_models()[0]
    try:
        planner = MergePlanner(
            config,
            get_architecture_info(config, options),
            options,
            shape_of.config(trust_remote_code=options.trust_remote_code),
        )
        # planning writes nothing: only executing a task does (and plan_in_memory raises in 0.1.5)
        planned = planner.plan_to_disk("")
    except _MISTAKES as error:
        raise UserError(f"recipe {recipe.path}: {one_line(error)}") from error
    return [task.tensor_task for task in planned if isinstance(task, SaveTensor)]


def _refuse_shifted_layers(tasks: list[ExecuteMergeMethodTask]) -> None:
    for task in tasks:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        for model, weight in gather.weight_info.items():
            if weight.name != task.output_weight.name:
                raise UserError(
                    f"slices: {weight.name} of {model} would become {task.output_weight.name}, "
                    "where other scores apply; weight_patching needs layers to keep their numbers"
                )


def _refuse_missing_tensors(tasks: list[ExecuteMergeMethodTask]) -> None:
    """Tensors that mergekit's definition asks for and a model does not store."""
    for task in tasks:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        for model, weight in gather.weight_info.items():
            if weight.optional:
                continue
            stored = LoaderCache().get(model).index.tensor_paths
            names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
            if any(name in stored for name in names):
                continue
            kind = model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
            if not can_convert_checkpoint_keys(kind, set(stored), weight.name):
                raise UserError(
                    f"model {model} stores no {weight.name}, which mergekit requires of every "
                    f"'{kind}' model in any merge method; use mergekit-pytorch on the weight files"
                )


def _refuse_lost_tensors(recipe: Recipe, tasks: list[ExecuteMergeMethodTask]) -> None:
    for file in score_files(recipe):
        planned = {file.scored_name(task.output_weight.name, None) for task in tasks}
        if lost := unwritten(file.tensor_names, planned):
            raise UserError(
                f"mergekit does not write {lost[0]}"
                + (f" and {len(lost) - 1} more scored tensors" if len(lost) > 1 else "")
                + f" of this architecture, so the merged model would lack them; {file.path} was "
                "scored with them. Use mergekit-pytorch on the weight files instead"
            )


def _sample(tasks: list[ExecuteMergeMethodTask]) -> None:
    """Hold a few tensors of every expert against its score file."""
    names: dict[tuple[ModelReference, ModelReference, ExpertScores, str], list[str]] = {}
    for task in tasks:
        if task.output_weight.vocabulary_axis is not None:
            continue  # large, and a recipe's tokenizer settings may rearrange them
        for model in task.input_parameters:
            if model != task.base_model:
                file = planned_source(task, model)
                granularity = task.parameters["granularity"]
                key = (task.base_model, model, file, granularity)
                names.setdefault(key, []).append(task.output_weight.name)
    for (base, expert, file, granularity), candidates in names.items():
        tied = is_tied(base)
        loaders = [LoaderCache().get(model) for model in (base, expert)]
        usable = {
            name: scored
            for name in candidates
            if file.covers(scored := file.scored_name(name, tied), granularity)
            and file.norm(scored) > 0
            and all(name in loader.index.tensor_paths for loader in loaders)
        }
        for name in _pick(list(usable), loaders[0], file):
            shown = f"tensor {name} of {expert}"
            pair = [loader.get_tensor(name) for loader in loaders]
            if pair[0].shape != pair[1].shape:
                raise UserError(f"{shown} has shape {list(pair[1].shape)}, not the base's")
            file.check_delta(usable[name], *pair, shown_as=shown)
        for loader in loaders:
            loader.flush()


def _pick(names: list[str], loader: LazyTensorLoader, file: ExpertScores) -> list[str]:
    """The smallest tensors, and evenly spaced ones of the layers."""
    sizes = _sizes(names, loader)
    smallest = sorted(names, key=lambda name: sizes.get(name, 0))[:SMALLEST]
    inside = [name for name in names if file.layout(name, "component").layer is not None]
    spaced = [inside[len(inside) * (i + 1) // (SPACED + 1)] for i in range(SPACED) if inside]
    return list(dict.fromkeys(smallest + spaced))


def _sizes(names: list[str], loader: LazyTensorLoader) -> dict[str, int]:
    """Elements of each tensor, from the headers of safetensors files; nothing for pickles."""
    sizes: dict[str, int] = {}
    if not loader.index.is_safetensors:
        return sizes
    wanted = set(names)
    for shard in loader.index.shards:
        with safe_open(os.path.join(loader.index.base_path, shard.filename), "pt") as handle:
            for name in wanted.intersection(shard.contained_keys):
                size = 1
                for extent in handle.get_slice(name).get_shape():
                    size *= extent
                sizes[name] = size
    return sizes
