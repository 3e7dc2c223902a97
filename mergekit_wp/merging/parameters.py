"""The parameters of ``weight_patching``, each checked by name.

Filters and gradients are mergekit's: it validates every number they can produce.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Annotated, Any

import click
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
)
from pydantic import AfterValidator, Field, ValidationError, WrapValidator

from mergekit_wp.errors import UserError
from mergekit_wp.merging.expert_scores import load
from mergekit_wp.models.hub import local_path
from mergekit_wp.terms import CRITERIA, FUSIONS, GRANULARITIES, WEIGHT_ESTIMANDS, CriterionName


class Recorded(threading.local):
    """Parameter values validated in this thread since the last `validate_inputs`.

    mergekit validates one value at a time, without telling the validator for which model or
    tensor, and calls ``validate_inputs(models, base, tensor name)`` after a tensor's values. Only
    there can a score file be held against the base's config, and that must happen while planning:
    before the first tensor is read. So the validators leave their values here, and
    `validate_inputs` takes them away. The planner does both in one thread; what an interrupted
    plan left behind is dropped when the next one starts, so that nothing passes between plans.
    """

    def __init__(self) -> None:
        """Start with nothing, in every thread."""
        self.values: dict[str, dict[str, None]] = {}

    def take(self) -> dict[str, dict[str, None]]:
        """What was validated since the last call: parameter name to values, in order."""
        values, self.values = self.values, {}
        return values


RECORDED = Recorded()


def _parameter(name: str, annotation: Any, expected: str) -> Any:
    """A value type whose errors name the parameter, which pydantic's do not."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise UserError(f"'{name}' must be {expected}, not {value!r}") from None

    return Annotated[annotation, WrapValidator(check)]


def _number(name: str, low: float | None = None, high: float | None = None) -> Any:
    expected = "a finite number"
    if low is not None:
        expected = f"a number from {low:g} to {high:g}" if high else f"a number of at least {low:g}"
    return _parameter(name, Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)], expected)


def _recorded(name: str, value: str) -> str:
    RECORDED.values.setdefault(name, {})[value] = None
    return value


def _one_of(name: str, options: Sequence[str]) -> Any:
    def check(value: str) -> str:
        if value not in options:
            raise UserError(f"'{name}' must be one of {', '.join(options)}, not '{value}'")
        return _recorded(name, value)

    text = Annotated[str, AfterValidator(check)]
    return _parameter(name, text, f"one of {', '.join(options)}")


_CRITERION = _parameter(
    "criterion",
    Annotated[CriterionName, AfterValidator(partial(_recorded, "criterion"))],
    f"one of {', '.join(CRITERIA)}, or the name of the function that the experts were scored by",
)


def _score_file(value: str) -> str:
    if not value:
        return value
    path = local_path(_beside_the_recipe(value))
    load(path)
    RECORDED.values.setdefault("scores", {})[path] = None
    return path


def _beside_the_recipe(path: str) -> str:
    """A score file that lies beside the recipe which a command of mergekit runs.

    mergekit hands on what a recipe says, not where it is; only its command's arguments tell. It
    plans, and validates, in the thread that runs the command.
    """
    context = click.get_current_context(silent=True)
    recipe = None if context is None else context.params.get("config_file")
    beside = os.path.join(os.path.dirname(os.path.abspath(str(recipe))), os.path.expanduser(path))
    return beside if recipe is not None and os.path.isfile(beside) else path


_SCORES = _parameter("scores", Annotated[str, AfterValidator(_score_file)], "a score file's path")
_SHARED, _EXPERT = ParameterScope.SHARED, ParameterScope.NON_BASE

SPEC = MergeMethodSpec(
    name="weight_patching",
    pretty_name="Weight Patching",
    reference_url="https://arxiv.org/abs/2604.13694",
    parameters=(
        ParameterSpec("scores", _SCORES, _EXPERT),
        ParameterSpec("weight", _number("weight"), _EXPERT, default=1.0),
        ParameterSpec("density", _number("density", 0, 1), _EXPERT, default=1.0),
        ParameterSpec("fusion", _one_of("fusion", FUSIONS), _SHARED, default="share"),
        ParameterSpec("power", _number("power", 0), _SHARED, default=0.5),
        ParameterSpec("lambda", _number("lambda"), _SHARED, default=1.0),
        ParameterSpec("estimand", _one_of("estimand", WEIGHT_ESTIMANDS), _SHARED, default="share"),
        ParameterSpec("criterion", _CRITERION, _SHARED, default="kl"),
        ParameterSpec(
            "granularity", _one_of("granularity", GRANULARITIES), _SHARED, default="component"
        ),
    ),
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)
#: parameters that only some fusions look at
_USED_BY = {"power": ("share",), "estimand": tuple(f for f in FUSIONS if f != "path")}


def refuse_unused(given: Collection[str], fusions: Sequence[str]) -> None:
    """Refuse a parameter that none of a merge's fusions looks at.

    Raises:
        UserError: names it.
    """
    for name, using in _USED_BY.items():
        if name in given and not any(fusion in using for fusion in fusions):
            raise UserError(
                f"'{name}' does nothing under fusion '{fusions[0]}', only under "
                f"{', '.join(using)}; leave it out, or choose another fusion"
            )
