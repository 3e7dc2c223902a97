"""From what the user asks to a plan: recipes, tasks, methods, and a fingerprint of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import Field, model_validator

from mergekit_wp.comparison.methods import (
    DEFAULT_METHODS,
    QUICK_METHODS,
    Method,
    as_long_as,
    methods_of,
    read_grid,
)
from mergekit_wp.comparison.plan import Plan, overlaps
from mergekit_wp.comparison.results import SCORE_FILES
from mergekit_wp.errors import UserError, option
from mergekit_wp.files import scorefile
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.interface import difference_note, settings_of
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.model_names import distinct_names, place
from mergekit_wp.options import Argument, Option, Request
from mergekit_wp.prompts import Prompt, PromptSource, read_prompts
from mergekit_wp.prompts.request import SOURCE
from mergekit_wp.runs.request import (
    CALIBRATION,
    PROMPTS_OF_EACH,
    BatchSize,
    CheckersFile,
    Device,
    MaxNewTokens,
    Ray,
    Restart,
)
from mergekit_wp.runs.warnings import emulated
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.load import Loading
from mergekit_wp.tasks.skill import Skill
from mergekit_wp.tasks.task import Task
from mergekit_wp.terms import DTYPE_ALIASES, DTypeName
from mergekit_wp.version import __version__


class CompareRequest(Request):
    """Everything `mergekit-wp compare` is asked for.

    ``recipes`` are files, or what such a file holds. Without ``out`` nothing is kept.
    """

    recipes: Annotated[tuple[Path | dict[str, Any], ...], Argument(path="any")] = Field(
        min_length=1,
        description="The weight_patching recipe in question, and any others of the same models.",
    )
    tasks: Annotated[tuple[str, ...], Option(flag="task", metavar="SPEC", repeated=True)] = Field(
        description="What to measure on; once per task. SOURCE or NAME=SOURCE (see `prompts`) "
        "of items: 'prompt', 'answer', 'split' (valid or test), 'checker' (exact: nothing but the "
        "answer, which the model ends; contains, number, regex, ifeval; SOURCE?checker=NAME for "
        "all). Anything else is an lm-eval task, by name or YAML file (pip install "
        "'mergekit-wp[eval]'); lm-eval:TASK?split=NAME&sample=N "
        "takes other documents. Tasks that are given one NAME are one column.",
    )
    validation: Annotated[tuple[str, ...], Option(metavar="NAME=SPEC", repeated=True)] = Field(
        default=(),
        description="What parameters are chosen on in place of a task's own validation items, by "
        f"the NAME of a task; as in {option('tasks')}, once each.",
    )
    keep: Annotated[tuple[str, ...], Option(metavar="SPEC", repeated=True)] = Field(
        default=(),
        description="What a merge should not forget, once each: plain text FILE.txt (perplexity), "
        f"or a task as in {option('tasks')} (test items only). The table says what each merge lost "
        "most.",
    )
    out: Annotated[Path | None, Option(path="any")] = Field(
        default=None, description="Folder for results."
    )
    methods: Annotated[
        tuple[str, ...] | None,
        Option(
            metavar="A,B,...",
            default=f"{', '.join(m for m in DEFAULT_METHODS if not m.endswith('+aim'))}; with "
            f"{option('calibration')} also "
            f"{', '.join(m for m in DEFAULT_METHODS if m.endswith('+aim'))}",
        ),
    ] = Field(default=None, description="Methods to compare.")
    grid: Path | None = Field(
        default=None,
        description="YAML that replaces grids: `ties: {density: [0.2, 0.5], lambda: [0.7, 1.0]}`.",
    )
    untuned: bool = Field(
        default=False,
        description="Merge by every method's usual parameters only; needs no validation items.",
    )
    quick: bool = Field(
        default=False,
        description=f"A first look: {', '.join(QUICK_METHODS)}, beside base and experts, all "
        f"{option('untuned', True)}.",
    )
    relative: bool = Field(
        default=False, description="Count each task relative to the expert that is best at it."
    )
    repeats: int = Field(
        default=1,
        ge=1,
        description="Merges by methods that draw (DARE, DELLA), each with another seed.",
    )
    calibration: Annotated[Path | None, SOURCE] = Field(default=None, description=CALIBRATION)
    prompts: Annotated[tuple[tuple[str, PromptSource], ...], Option(metavar="EXPERT=SOURCE")] = (
        Field(default=(), description=PROMPTS_OF_EACH)
    )
    checkers: CheckersFile = None
    max_new_tokens: MaxNewTokens = 64
    batch_size: BatchSize = None
    device: Device = Field(default="auto", validate_default=True)
    dtype: Annotated[
        DTypeName | None, Option(default="the recipe's; float32 on a CPU", aliases=DTYPE_ALIASES)
    ] = Field(default=None, description="Of weights and activations while a merge is evaluated.")
    merge_in: Literal["auto", "memory", "disk"] = Field(
        default="auto",
        description="Where merges go; auto: in memory up to 2 GB of float32 weights, else into a "
        f"folder in {option('out')} that is removed after evaluation. AIM's are always made in "
        "memory.",
    )
    ray: Ray = False
    restart: Restart = False

    @model_validator(mode="before")
    @classmethod
    def _quickly(cls, given: Any) -> Any:
        """A first look says itself which methods, and how."""
        if not isinstance(given, dict) or not given.get("quick"):
            return given
        for name in ("methods", "grid"):
            if given.get(name):
                raise UserError(
                    f"{option('quick', True)} chooses the methods, and tunes none; leave out "
                    f"{option(name)}, or {option('quick', True)}"
                )
        return given | {"methods": QUICK_METHODS, "untuned": True}


def _places(experts: Experts) -> tuple[object, frozenset[object]]:
    """Base and experts, however recipes write them."""
    base, *models = map(ModelReference.model_validate, (experts.base, *experts.models))
    return place(base), frozenset(map(place, models))


def make_plan(request: CompareRequest, *, fitted: bool = True) -> tuple[Plan, list[str]]:
    """The plan, and what the user should know of it.

    Args:
        request: what is compared.
        fitted: whether the first recipe is ours; else it only names the experts that will be
            fitted, for a plan that is not carried out.

    Raises:
        UserError: any mistake that shows before the first merge.
    """
    read = [recipes.read(given) for given in request.recipes]
    first = _first(read) if fitted else read[0].config
    experts = Experts.of(first, read[0].path)
    fixed: dict[str, MergeConfiguration] = {}
    for other in read[1:]:
        if _places(Experts.of(other.config, other.path)) != _places(experts):
            raise UserError(
                f"recipe {other.path} has other models than {read[0].path}; all recipes of a "
                "comparison merge the same experts into the same base"
            )
        # every fit's recipe is called alike
        name = other.path.absolute().parent.name if other.path.name == RECIPE else other.path.stem
        if name in fixed:
            raise UserError(f"two recipes are called '{name}'; rename one")
        fixed[name] = other.config
    notes: list[str] = []
    calibration: tuple[Prompt, ...] = ()
    if request.calibration:
        read_calibration = read_prompts(request.calibration, None)
        calibration = read_calibration.prompts
        notes += [] if read_calibration.plain else [read_calibration.said]
    wanted = request.methods
    if wanted is None:
        wanted = DEFAULT_METHODS
        if not calibration:
            wanted = tuple(name for name in wanted if not name.endswith("+aim"))
            notes.append(f"AIM is left out: it needs {option('calibration', 'PROMPTS.jsonl')}")
    methods = methods_of(wanted, len(experts.models), first)
    how = _fit_of(first)
    methods = tuple(as_long_as(method, how) for method in methods)
    if request.grid:
        grids = read_grid(request.grid, {method.name: method for method in methods})
        methods = tuple(_with_grid(method, grids) for method in methods)
    dtype = first.dtype or "float32"
    tasks, keep = _tasks(request)
    eval_dtype = request.dtype or ("float32" if request.device == "cpu" else dtype)
    plan = Plan(
        base=experts.base,
        experts=experts.models,
        names=distinct_names(experts.models),
        recipe=first,
        extra=fixed,
        methods=methods,
        tasks=tasks,
        keep=keep,
        tuned=not request.untuned,
        relative=request.relative,
        seeds=request.repeats,
        calibration=calibration,
        prompts=request.prompts,
        max_new_tokens=request.max_new_tokens,
        dtype=dtype,
        device=request.device,
        eval_dtype=_dtype(eval_dtype),
        in_memory={"auto": None, "memory": True, "disk": False}[request.merge_in],
    )
    plan.check()
    plan = replace(plan, warnings=tuple(overlaps(plan)))
    notes += plan.warnings
    if not request.ray and (line := emulated(plan.eval_dtype, request.device)):
        notes.append(line)
    notes += [task.said for task in plan.tasks if isinstance(task, JsonlTask | Skill) and task.said]
    # other recipes may have tokenizers of their own
    settings = {repr(settings_of(config)): config for config in [*fixed.values(), first]}
    lines = [difference_note(c, MergeOptions()) for c in reversed(settings.values())]
    notes += [line for line in lines if line is not None]
    return plan, notes


def _fit_of(config: MergeConfiguration) -> Fit | None:
    """How the gates were fitted that a recipe merges by; None where they were not."""
    texts = recipes.score_texts(data_of(config))
    return scorefile.read(local_path(texts[0])).manifest.fit if texts else None


def _tasks(request: CompareRequest) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """What is measured, with the items that parameters are chosen on, and what is kept.

    Raises:
        UserError: no such task, a file that cannot be used, or validation of no task or without
            choice.
    """
    if request.untuned and request.validation:
        raise UserError(
            f"nothing is chosen by {option('validation')} with {option('untuned', True)} or "
            f"{option('quick', True)}; leave out one of them"
        )
    loading = Loading(Checkers.load(request.checkers), request.max_new_tokens, request.batch_size)
    tasks = loading.load(request.tasks, "test" if request.untuned else None)
    instead = {task.name: task for task in loading.load(request.validation, "valid")}
    names = [task.name for task in tasks]
    if strange := [name for name in instead if name not in names]:
        raise UserError(
            f"{option('validation', strange[0])} names no task; tasks are {', '.join(names)}"
        )
    chosen = tuple(
        Skill(task.name, (instead[task.name],), (task,)) if task.name in instead else task
        for task in tasks
    )
    return chosen, loading.load(request.keep, "test", texts=True)


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What results depend on beside model, setting and seed."""

    def weights(reference: str) -> str:
        checkpoint = Checkpoint(reference)
        asked = checkpoint.interface()
        how = "" if asked is None else f" {asked.digest()[:16]}"
        return f"{checkpoint.config_hash[:16]} {checkpoint.weights_sha256()[:32]}{how}"

    def content(path: str) -> str:
        return hashlib.sha256(Path(local_path(path)).read_bytes()).hexdigest()

    def recipe(config: MergeConfiguration) -> str:
        data = recipes.with_scores(data_of(config), content)
        models = [model.get("parameters") for model in data.pop("models", None) or []]
        said = json.dumps([data, models], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    return {
        "base": weights(plan.base),
        "experts": {name: weights(e) for name, e in zip(plan.names, plan.experts, strict=True)},
        "recipe": recipe(plan.recipe) if plan.recipe else None,
        "other recipes": {name: recipe(config) for name, config in plan.extra.items()},
        SCORE_FILES: {
            path: content(path)
            for config in (plan.recipe, *plan.extra.values())
            if config is not None
            for path in recipes.score_texts(data_of(config))
        },
        "tasks": {task.name: task.fingerprint for task in (*plan.tasks, *plan.keep)},
        "calibration": hashlib.sha256(repr(plan.calibration).encode()).hexdigest()[:32],
        "prompts of experts": {
            name: f"{read_prompts(source, None, name).sha256[:32]} {plan.max_new_tokens}"
            for name, source in plan.prompts
        },
        "dtype": plan.dtype,
        "evaluation dtype": str(plan.eval_dtype),
        "mergekit-wp": __version__,
    }


def _first(read: Sequence[recipes.Recipe]) -> MergeConfiguration:
    """Our own recipe: the first one given."""
    if not read[0].is_weight_patching:
        raise UserError(
            f"recipe {read[0].path} merges by {read[0].config.merge_method}; the first "
            "recipe must be the weight_patching one that the others are compared with"
        )
    return read[0].config


def _with_grid(method: Method, grids: dict[str, tuple[Any, ...]]) -> Method:
    return replace(method, grid=grids[method.name]) if method.name in grids else method


def _dtype(name: str) -> torch.dtype:
    try:
        found: torch.dtype = dtype_from_name(name)
    except RuntimeError as error:
        raise UserError(f"{option('dtype', name)}: {error}") from error
    return found
