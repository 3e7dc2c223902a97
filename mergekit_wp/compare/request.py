"""From what the user asks to a plan: recipes, tasks, methods, and a fingerprint of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ConfigDict, Field

import mergekit_wp
from mergekit_wp.compare.methods import DEFAULT_METHODS, OURS, Method, methods_of, read_grid
from mergekit_wp.compare.plan import Plan
from mergekit_wp.errors import UserError, option
from mergekit_wp.merging import recipe as recipes
from mergekit_wp.merging.recipe import Experts
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.placement import choose_device
from mergekit_wp.prompts import read_prompts
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.task import Task

#: folder of kept merges, inside --out
KEPT = "merged"


class CompareRequest(BaseModel):
    """Everything `mergekit-wp compare` is asked for; see its ``--help``.

    ``recipes`` are files, or what such a file holds. Without ``out`` nothing is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipes: tuple[Path | dict[str, Any], ...] = ()
    tasks: tuple[str, ...]
    out: Path | None = None
    base: str | None = None
    experts: tuple[tuple[str, str], ...] = ()
    methods: tuple[str, ...] | None = None
    grid: Path | None = None
    untuned: bool = False
    relative: bool = False
    seeds: int = Field(1, ge=1)
    calibration: Path | None = None
    checkers: Path | None = None
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int | None = Field(None, ge=1)
    device: str = "auto"
    eval_dtype: str | None = None
    merge_in: Literal["auto", "memory", "disk"] = "auto"
    keep: bool = False
    restart: bool = False


def make_plan(request: CompareRequest) -> tuple[Plan, list[str]]:
    """The plan, and what the user should know of it.

    Raises:
        UserError: any mistake that shows before the first merge.
    """
    device = choose_device(request.device)
    if request.keep and request.out is None:
        raise UserError(f"{option('keep')} keeps merges in {option('out', 'FOLDER')}; give both")
    read = [recipes.read(given) for given in request.recipes]
    first = _first(request, read)
    experts = Experts.of(first, read[0].path if read else f"of {option('experts')}")
    fixed: dict[str, MergeConfiguration] = {}
    for other in read[1:]:
        theirs = Experts.of(other.config, other.path)
        if (theirs.base, set(theirs.models)) != (experts.base, set(experts.models)):
            raise UserError(
                f"recipe {other.path} has other models than {read[0].path}; all recipes of a "
                "comparison merge the same experts into the same base"
            )
        if other.path.stem in fixed:
            raise UserError(f"two recipes are called '{other.path.stem}'; rename one")
        fixed[other.path.stem] = other.config
    notes: list[str] = []
    calibration = read_prompts(request.calibration, None).prompts if request.calibration else ()
    wanted = request.methods
    if wanted is None:
        wanted = DEFAULT_METHODS
        if not calibration:
            wanted = tuple(name for name in wanted if not name.endswith("+aim"))
            notes.append(f"AIM is left out: it needs {option('calibration', 'PROMPTS.jsonl')}")
    methods = methods_of(wanted, len(experts.models), first)
    if request.grid:
        grids = read_grid(request.grid, {method.name: method for method in methods})
        methods = tuple(_with_grid(method, grids) for method in methods)
    dtype = first.dtype or "float32"
    eval_dtype = request.eval_dtype or ("float32" if device == "cpu" else dtype)
    plan = Plan(
        base=experts.base,
        experts=experts.models,
        names=_names(experts.models),
        recipe=first,
        extra=fixed,
        methods=methods,
        tasks=load_tasks(request),
        tuned=not request.untuned,
        relative=request.relative,
        seeds=request.seeds,
        calibration=tuple(calibration),
        dtype=dtype,
        device=device,
        eval_dtype=_dtype(eval_dtype),
        in_memory={"auto": None, "memory": True, "disk": False}[request.merge_in],
        keep=request.out / KEPT if request.keep and request.out else None,
    )
    plan.check()
    return plan, notes


def load_tasks(request: CompareRequest) -> tuple[Task, ...]:
    """JSONL files by their names, everything else from lm-eval.

    Raises:
        UserError: no such task, or a file that cannot be used.
    """
    checkers = Checkers.load(request.checkers)
    found: list[Task] = []
    for spec in request.tasks:
        name, equals, path = spec.partition("=")
        file = Path(path if equals else spec)
        if file.suffix == ".jsonl":
            found.append(
                JsonlTask.read(
                    file,
                    checkers,
                    name=name if equals else None,
                    max_new_tokens=request.max_new_tokens,
                    batch_size=request.batch_size,
                )
            )
            continue
        from mergekit_wp.tasks.lm_eval import LmEvalTask

        found.append(LmEvalTask.load(spec, batch_size=request.batch_size))
    return tuple(found)


def fingerprint(plan: Plan) -> dict[str, Any]:
    """What results depend on beside model, setting and seed."""

    def weights(reference: str) -> str:
        checkpoint = Checkpoint(reference)
        checkpoint.require_whole("compare")
        return f"{checkpoint.config_hash[:16]} {checkpoint.weights_sha256()[:32]}"

    def recipe(config: MergeConfiguration) -> str:
        digest = hashlib.sha256(config.model_dump_json(exclude={"models"}).encode())
        for model in config.models or []:
            if scores := (model.parameters or {}).get("scores"):
                digest.update(Path(local_path(str(scores))).read_bytes())
            rest = {k: v for k, v in (model.parameters or {}).items() if k != "scores"}
            digest.update(repr(sorted(rest.items())).encode())
        return digest.hexdigest()[:32]

    return {
        "base": weights(plan.base),
        "experts": {name: weights(e) for name, e in zip(plan.names, plan.experts, strict=True)},
        "recipe": recipe(plan.recipe) if plan.recipe else None,
        "other recipes": {name: recipe(config) for name, config in plan.extra.items()},
        "tasks": {task.name: task.fingerprint for task in plan.tasks},
        "calibration": hashlib.sha256(repr(plan.calibration).encode()).hexdigest()[:32],
        "dtype": plan.dtype,
        "evaluation dtype": str(plan.eval_dtype),
        "mergekit-wp": mergekit_wp.__version__,
    }


def _first(request: CompareRequest, read: Sequence[recipes.Recipe]) -> MergeConfiguration:
    """Our own recipe: the first one given, or one of listed experts."""
    if bool(read) == bool(request.base or request.experts):
        raise UserError(
            f"give either a weight_patching RECIPE, or {option('base', 'BASE')} with "
            f"{option('experts', 'EXPERT SCORES')} for every expert"
        )
    if read:
        if not read[0].is_weight_patching:
            raise UserError(
                f"recipe {read[0].path} merges by {read[0].config.merge_method}; the first "
                "recipe must be the weight_patching one that the others are compared with"
            )
        return read[0].config
    if not request.base or not request.experts:
        raise UserError(f"{option('base')} and {option('experts', 'EXPERT SCORES')} go together")
    return MergeConfiguration.model_validate(
        {
            "merge_method": OURS,
            "base_model": request.base,
            "models": [
                {"model": expert, "parameters": {"scores": local_path(scores)}}
                for expert, scores in request.experts
            ],
            "dtype": "float32",
        }
    )


def _with_grid(method: Method, grids: dict[str, tuple[Any, ...]]) -> Method:
    return replace(method, grid=grids[method.name]) if method.name in grids else method


def _names(models: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of the models' paths that tell them apart."""
    parts = [model.rstrip("/").split("/") for model in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(p[-depth:]) for p in parts)
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the recipe names {models[0]} twice")


def _dtype(name: str) -> torch.dtype:
    try:
        found: torch.dtype = dtype_from_name(name)
    except RuntimeError as error:
        raise UserError(f"{option('eval_dtype', name)}: {error}") from error
    return found
