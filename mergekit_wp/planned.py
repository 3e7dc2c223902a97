"""The gates of a planned merge: what it will do, known before any weight is read."""

from __future__ import annotations

from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_wp.method import Gated, is_tied, weight_patching


def planned_gates(task: ExecuteMergeMethodTask) -> Gated | None:
    """The gates with which a planned weight_patching merge will fuse one tensor.

    Args:
        task: one of mergekit's plan.

    Returns:
        None where no score file covers the tensor, which then stays at the base.

    Raises:
        UserError: score files or guards that do not fit the recipe or each other.
    """
    given = {m: values for m, values in task.input_parameters.items() if m != task.base_model}
    names = dict.fromkeys(key for values in given.values() for key in values)
    by_name = {key: {model: values[key] for model, values in given.items()} for key in names}
    return weight_patching.gates(
        task.output_weight.name,
        list(given),
        {**task.parameters, **by_name},
        is_tied(task.base_model),
    )
