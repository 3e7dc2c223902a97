"""A recipe held against its models, before the first hour of merging.

Configs first (small), then weights are opened, then mergekit's own planner runs dry, which
validates every parameter for every tensor; last, a few tensors of every expert are read and
compared with its score file. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_wp.errors import UserError
from mergekit_wp.merging.expert_scores import ExpertScores
from mergekit_wp.merging.host import is_tied, shown, unwritten
from mergekit_wp.merging.plan import plan, planned_gates, planned_source
from mergekit_wp.merging.recipe import Recipe
from mergekit_wp.models.refusals import headers, width

#: Tensors per expert that are read before the merge: the smallest, and evenly spaced layer tensors.
SMALLEST, SPACED = 3, 2


def check(
    recipe: Recipe, options: MergeOptions, *, only_to_plan: bool = False
) -> list[ExecuteMergeMethodTask]:
    """Refuse a recipe that would fail, or merge something else than meant.

    Args:
        recipe: of any method.
        options: of mergekit.
        only_to_plan: adapters are not merged, and no tensors of experts that have one are read.

    Returns:
        mergekit's plan: one task for every tensor that the merge will write.

    Raises:
        UserError: one sentence naming the culprit.
    """
    tasks = plan(recipe, options, only_to_plan=only_to_plan)
    if recipe.is_weight_patching:
        _refuse_shifted_layers(tasks)
        _refuse_missing_tensors(tasks)
        _refuse_other_shapes(tasks)
        _refuse_lost_tensors(recipe, tasks)
        for task in tasks:
            planned_gates(task)  # refuses score files that do not fit
        _sample(tasks, only_to_plan)
    return tasks


def shapes_of(model: ModelReference) -> dict[str, tuple[int, ...]]:
    """Of an opened model's weights, by stored name; nothing for pickles."""
    return {name: shape for name, (shape, _) in _headers(model).items()}


def stored_bytes(model: ModelReference) -> int:
    """Bytes of an opened model's weights; 0 for pickles, of which nobody knows."""
    sizes = (math.prod(shape) * width(dtype) for shape, dtype in _headers(model).values())
    return sum(sizes)


def _inputs(
    task: ExecuteMergeMethodTask,
) -> Iterator[tuple[ModelReference, WeightInfo, tuple[str, ...]]]:
    """What a merge reads of each model for one tensor, and under which names it may be stored."""
    gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
    for model, weight in gather.weight_info.items():
        yield model, weight, (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


def _headers(model: ModelReference) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored dtype of a model's tensors; nothing for pickles."""
    index = LoaderCache().get(model).index
    return headers(index, str(model)) if index.is_safetensors else {}


def _refuse_shifted_layers(tasks: list[ExecuteMergeMethodTask]) -> None:
    for task in tasks:
        for model, weight, _ in _inputs(task):
            if weight.name != task.output_weight.name:
                raise UserError(
                    f"slices: {weight.name} of {model} would become {task.output_weight.name}, "
                    "where other scores apply; weight_patching needs layers to keep their numbers"
                )


def _refuse_missing_tensors(tasks: list[ExecuteMergeMethodTask]) -> None:
    """Tensors that mergekit's definition asks for and a model does not store."""
    for task in tasks:
        for model, weight, names in _inputs(task):
            stored = LoaderCache().get(model).index.tensor_paths
            if weight.optional or any(name in stored for name in names):
                continue
            kind = model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
            if not can_convert_checkpoint_keys(kind, set(stored), weight.name):
                raise UserError(
                    f"model {model} stores no {weight.name}, which mergekit requires of every "
                    f"'{kind}' model in any merge method; use mergekit-pytorch on the weight files"
                )


def _refuse_other_shapes(tasks: list[ExecuteMergeMethodTask]) -> None:
    """Tensors that the base stores in another shape, among them embeddings of other tokens."""
    stored = {m: _headers(m) for m in {model for task in tasks for model in task.model_order}}
    for task in tasks:
        if not isinstance(task.gather_tensors, GatherTensors):
            continue  # mergekit aligns its tokens first
        found = {
            model: next((stored[model][name][0] for name in names if name in stored[model]), None)
            for model, _, names in _inputs(task)
        }
        wanted = found.get(task.base_model)
        for model, shape in found.items():
            if wanted is not None and shape is not None and shape != wanted:
                raise UserError(
                    f"tensor {task.output_weight.name} of {model} has shape {list(shape)}, that of "
                    f"the base {list(wanted)}"
                    + (
                        ": their vocabularies differ; add 'tokenizer: {source: union}' or "
                        "'{source: base}' to the recipe"
                        if task.output_weight.vocabulary_axis is not None
                        else ""
                    )
                )


def _refuse_lost_tensors(recipe: Recipe, tasks: list[ExecuteMergeMethodTask]) -> None:
    for file in recipe.score_files:
        planned = {file.scored_name(task.output_weight.name, None) for task in tasks}
        if lost := unwritten(file.tensor_names, planned):
            raise UserError(
                f"mergekit does not write {lost[0]}"
                + (f" and {len(lost) - 1} more scored tensors" if len(lost) > 1 else "")
                + f" of this architecture, so the merged model would lack them; {file.path} was "
                "scored with them. Use mergekit-pytorch on the weight files instead"
            )


def _sample(tasks: list[ExecuteMergeMethodTask], without_adapters: bool) -> None:
    """Hold a few tensors of every expert against its score file."""
    names: dict[tuple[ModelReference, ModelReference, ExpertScores, str], list[str]] = {}
    for task in tasks:
        if task.output_weight.vocabulary_axis is not None:
            continue  # large, and a recipe's tokenizer settings may rearrange them
        for model in task.input_parameters:
            if model != task.base_model and not (without_adapters and model.lora):
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
        for name in _pick(list(usable), base, file):
            pair = [loader.get_tensor(name) for loader in loaders]
            file.check_delta(usable[name], *pair, shown_as=shown(name, expert))
        for loader in loaders:
            loader.flush()


def _pick(names: list[str], base: ModelReference, file: ExpertScores) -> list[str]:
    """The smallest tensors, and evenly spaced ones of the layers."""
    stored = _headers(base)
    size = {name: math.prod(stored[name][0]) if stored else 0 for name in names}
    smallest = sorted(names, key=size.__getitem__)[:SMALLEST]
    inside = [name for name in names if file.layout(name, "component").layer is not None]
    spaced = [inside[len(inside) * (i + 1) // (SPACED + 1)] for i in range(SPACED) if inside]
    return list(dict.fromkeys(smallest + spaced))
