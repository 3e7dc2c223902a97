"""mergekit's plan of a recipe, and the gates it will use: known before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_wp.components import GateLayout
from mergekit_wp.errors import UserError, option
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.expert_scores import ExpertScores
from mergekit_wp.merging.host import is_tied, raised_by_mergekit
from mergekit_wp.merging.method import Gated, source, tensor_gates
from mergekit_wp.merging.open_models import MISTAKES, forget_adapters, open_models
from mergekit_wp.merging.recipe import Recipe, one_line


def planned_gates(task: ExecuteMergeMethodTask, *, by_component: bool = False) -> Gated | None:
    """The gates with which a planned weight_patching merge will fuse one tensor.

    Args:
        task: one of mergekit's plan.
        by_component: of finer gates, the means that components have.

    Returns:
        None where no score file covers the tensor, which then stays at the base.

    Raises:
        UserError: score files that do not fit the recipe or each other.
    """
    parameters, tied = _parameters(task), is_tied(task.base_model)
    experts = (model for model in task.input_parameters if model != task.base_model)
    files = {expert: source(parameters, expert) for expert in experts}
    name = task.output_weight.name
    return tensor_gates(name, files, parameters, tied, by_component=by_component)


def planned_source(task: ExecuteMergeMethodTask, expert: ModelReference) -> ExpertScores:
    """What says how much of an expert one tensor takes."""
    return source(_parameters(task), expert)


def _parameters(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """As mergekit hands them to the method: those of experts by name, then by model."""
    given = {m: values for m, values in task.input_parameters.items() if m != task.base_model}
    names = dict.fromkeys(key for values in given.values() for key in values)
    by_name = {key: {model: values[key] for model, values in given.items()} for key in names}
    return {**task.parameters, **by_name}


class ExpertGates(NamedTuple):
    """What a recipe takes of one expert.

    Attributes:
        gates: how they lie and ``[gates of the tensor]``, by tensor name.
        files: the score files that say so, by path.
    """

    gates: dict[str, tuple[GateLayout, torch.Tensor]]
    files: dict[str, ExpertScores]


def recipe_gates(path: Path) -> list[ExpertGates]:
    """The gates of a weight_patching recipe, for each expert in order.

    Raises:
        UserError: a recipe of another method, or a mistake in it.
    """
    recipe = recipes.read(path)
    if not recipe.is_weight_patching:
        raise UserError(
            f"recipe {path} is of '{recipe.config.merge_method}' and has no scores to start from; "
            f"give {option('start')} a number"
        )
    order = recipes.experts_in_order(recipe.config)
    found = [ExpertGates({}, {}) for _ in order]
    for task in plan_only(recipe):
        gated = planned_gates(task)
        if gated is not None:
            for expert, gates in zip(gated.experts, gated.gates, strict=True):
                own, file = found[order.index(expert)], planned_source(task, expert)
                name = file.scored_name(task.output_weight.name, None)  # the parameter's
                own.gates[name] = gated.layout, gates
                own.files[file.path] = file
    return found


def plan(
    recipe: Recipe, options: MergeOptions, *, only_to_plan: bool = False
) -> list[ExecuteMergeMethodTask]:
    """Mergekit's plan of a recipe, every parameter validated for every tensor; reads no weights.

    Args:
        recipe: of any method.
        options: of mergekit.
        only_to_plan: see `open_models`.

    Raises:
        UserError: a model cannot be read, or a parameter is wrong.
    """
    open_models(recipe, options, only_to_plan=only_to_plan)
    return _dry_plan(recipe, options)


def plan_only(recipe: Recipe) -> list[ExecuteMergeMethodTask]:
    """The same of a recipe that will not be merged now: its adapters are merged into nothing."""
    try:
        open_models(recipe, MergeOptions(), only_to_plan=True)
        return _dry_plan(recipe, MergeOptions())
    finally:
        forget_adapters(recipe)


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
    except MISTAKES as error:
        if not raised_by_mergekit(error):
            raise
        raise UserError(f"recipe {recipe.path}: {one_line(error)}") from error
    return [task.tensor_task for task in planned if isinstance(task, SaveTensor)]
