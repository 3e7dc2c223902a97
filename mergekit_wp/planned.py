"""The gates of a planned merge: what it will do, known before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_wp import recipe as recipes
from mergekit_wp.errors import UserError
from mergekit_wp.expert_scores import ExpertScores
from mergekit_wp.host import is_tied
from mergekit_wp.method import Gated, source, weight_patching


def planned_gates(task: ExecuteMergeMethodTask) -> Gated | None:
    """The gates with which a planned weight_patching merge will fuse one tensor.

    Args:
        task: one of mergekit's plan.

    Returns:
        None where no score file covers the tensor, which then stays at the base.

    Raises:
        UserError: score files or guards that do not fit the recipe or each other.
    """
    given = [model for model in task.input_parameters if model != task.base_model]
    name, tied = task.output_weight.name, is_tied(task.base_model)
    return weight_patching.gates(name, given, _parameters(task), tied)


def planned_source(task: ExecuteMergeMethodTask, expert: ModelReference) -> ExpertScores:
    """What says how much of an expert one tensor takes."""
    return source(_parameters(task), expert)


def _parameters(task: ExecuteMergeMethodTask) -> dict[str, Any]:
    """As mergekit hands them to the method: those of experts by name, then by model."""
    given = {m: values for m, values in task.input_parameters.items() if m != task.base_model}
    names = dict.fromkeys(key for values in given.values() for key in values)
    by_name = {key: {model: values[key] for model, values in given.items()} for key in names}
    return {**task.parameters, **by_name}


def recipe_gates(path: Path) -> list[dict[str, torch.Tensor]]:
    """The gates of a weight_patching recipe, by tensor name, for each expert in order.

    Raises:
        UserError: a recipe of another method, or a mistake in it.
    """
    from mergekit_wp.preflight import plan_only  # which reads this module in turn

    recipe = recipes.read(path)
    if not recipe.is_weight_patching:
        raise UserError(
            f"recipe {path} is of '{recipe.config.merge_method}' and has no scores to start from; "
            "give --start a number"
        )
    order = recipes.experts_in_order(recipe.config)
    found: list[dict[str, torch.Tensor]] = [{} for _ in order]
    for task in plan_only(recipe):
        gated = planned_gates(task)
        if gated is not None:
            for expert, gates in zip(gated.experts, gated.gates, strict=True):
                found[order.index(expert)][task.output_weight.name] = gates
    return found
