"""Merge methods to compare: what a user would write untuned, and a written grid to tune over.

Grids are small on purpose and the same for every method's kind of knob: how much of the task
vectors (weight or lambda, 0.1 to 2.2), and how many of their entries (density). docs/peers.md lists
them with the sources of the formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import ParameterScope

from mergekit_wp.comparison.peers.peer import Peer
from mergekit_wp.comparison.peers.table import AS_A_FIT, PEERS
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.errors import UserError
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.merging.interface import settings_of
from mergekit_wp.terms import FUSIONS

OURS = "weight_patching"
TASK_ARITHMETIC = "task_arithmetic"
#: task arithmetic with a weight for every expert
PER_EXPERT = "task_arithmetic_per_expert"
#: linear's share of the base, beside 1 for every expert; mergekit has no such parameter
BASE_WEIGHT = "base_weight"
#: AIM's own parameter (`mergekit_wp.merging.aim`)
OMEGA = "omega"


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: as in the table; ``NAME+aim`` is NAME with AIM on top.
        untuned: parameters of a user who does not tune.
        grid: parameters to choose from on validation items.
        draws: whether the merge depends on random numbers.
        peer: how it merges where mergekit does not.
        searched: the experts' weights are searched one by one, from the best common weight of
            `TASK_ARITHMETIC`, over the values of the grid.
    """

    name: str
    untuned: Setting
    grid: tuple[Setting, ...]
    draws: bool = False
    peer: Peer | None = None
    searched: bool = False

    @property
    def merge_method(self) -> str:
        """Mergekit's name."""
        return TASK_ARITHMETIC if self.searched else self.name.removesuffix("+aim")

    @property
    def on_top_of(self) -> str | None:
        """The method whose best setting this one goes on from, None for a grid of its own."""
        return self.merge_method if self.aim or self.searched else None

    @property
    def needs_prompts(self) -> bool:
        """Whether it is made with the experts' prompts."""
        return self.peer is not None and self.peer.needs_prompts

    def tries(self, n_experts: int) -> int:
        """About how many settings of it are evaluated, where it is tuned."""
        if self.searched:
            return 1 + n_experts * (len(self.grid) - 1)
        return len(self.grid) or len(OMEGAS)

    @property
    def aim(self) -> bool:
        """Whether AIM post-processes the merge."""
        return self.name.endswith("+aim")


def product(**values: Sequence[Any]) -> tuple[Setting, ...]:
    """All combinations, in order."""
    return tuple(
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    )


#: in the order of the table, those that take seconds; those with AIM need calibration prompts
DEFAULT_METHODS = (
    OURS,
    "task_arithmetic",
    "ties",
    "dare_ties",
    "dare_linear",
    "della",
    "breadcrumbs",
    "sce",
    "ram",
    "linear",
    PER_EXPERT,
    "model_stock",
    "karcher",
    "ramplus_tl",
    "tsv_merge",
    "iso_c",
    "consensus_ta",
    "localize_and_stitch_dataless",
    "task_arithmetic+aim",
    "ties+aim",
)
#: of a first look
QUICK_METHODS = (OURS, TASK_ARITHMETIC, "ties")
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.3)
OMEGAS = (0.2, 0.4, 0.6, 0.8)


def peers(n_experts: int) -> dict[str, Method]:
    """Every method but ours.

    Untuned, the weights of a sum are 1/n, which makes it an average; methods that normalise
    (TIES, DELLA) get weight 1. Densities are those of the papers' and mergekit's examples.
    """
    share = round(1 / n_experts, 4)
    table = [
        Method(
            "task_arithmetic",
            {"weight": share},
            product(weight=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)),
        ),
        Method(
            "ties",
            {"weight": 1.0, "density": 0.5, "lambda": 1.0},
            product(weight=(1.0,), density=(0.2, 0.5, 1.0), **{"lambda": LAMBDAS}),
        ),
        Method(
            "dare_ties",
            {"weight": share, "density": 0.5},
            product(weight=SCALES, density=(0.5, 0.8)),
            draws=True,
        ),
        Method(
            "dare_linear",
            {"weight": share, "density": 0.5},
            product(weight=SCALES, density=(0.5, 0.8)),
            draws=True,
        ),
        Method(
            "della",
            {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "lambda": 1.0},
            product(weight=(1.0,), density=(0.5, 0.8), epsilon=(0.15,), **{"lambda": LAMBDAS}),
            draws=True,
        ),
        Method(
            "breadcrumbs",
            {"weight": share, "density": 0.9, "gamma": 0.01},
            product(weight=SCALES, density=(0.5, 0.9), gamma=(0.01,)),
        ),
        Method("sce", {"select_topk": 1.0}, product(select_topk=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0))),
        Method("ram", {}, ({},)),
        Method("linear", {BASE_WEIGHT: 0.0}, product(**{BASE_WEIGHT: (0.0, 0.5, 1.0, 2.0)})),
        Method(
            PER_EXPERT,
            {"weight": share},
            product(weight=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3)),
            searched=True,
        ),
        Method("model_stock", {"filter_wise": False}, product(filter_wise=(False, True))),
        Method("karcher", {}, ({},)),
        Method(
            "ramplus_tl",
            {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
            product(r=(0.1,), alpha=(0.2,), epsilon=(1e-5, 1e-4, 1e-3)),
        ),
    ]
    table += [
        Method(
            name,
            entry.untuned,
            tuple(entry.untuned | chosen for chosen in product(**entry.grid)),
            peer=entry.peer,
        )
        for name, entry in PEERS.items()
    ]
    methods = {method.name: method for method in table}
    for name in ("task_arithmetic", "ties"):
        under = methods[name]
        methods[f"{name}+aim"] = replace(
            under, name=f"{name}+aim", untuned=under.untuned | {OMEGA: 0.4}, grid=()
        )
    return methods


def ours(recipe: MergeConfiguration) -> Method:
    """Weight patching as a recipe has it, and a grid over what the recipe leaves at one value."""
    fusion = (recipe.parameters or {}).get("fusion", "share")
    if fusion in FUSIONS and fusion != "share":  # no other looks at powers
        grid = product(**{"lambda": (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)})
    else:
        grid = product(power=(0.5, 1.0), **{"lambda": (0.5, 0.7, 1.0, 1.3)})
    return Method(OURS, {}, grid)


def with_aim(method: Method, best: Setting) -> Method:
    """AIM's grid on top of the setting that won without it."""
    return replace(method, grid=tuple(best | {OMEGA: omega} for omega in OMEGAS))


def weights_of(n_experts: int) -> list[str]:
    """Parameters of `PER_EXPERT`: a weight for each expert, in the recipe's order."""
    return [f"weight {number}" for number in range(1, n_experts + 1)]


def configuration(
    method: Method,
    setting: Setting,
    base: str,
    experts: Sequence[str],
    dtype: str,
    recipe: MergeConfiguration | None = None,
) -> MergeConfiguration:
    """The mergekit recipe of one setting.

    Args:
        method: which.
        setting: its parameters.
        base: the base model.
        experts: the others.
        dtype: of the merge.
        recipe: ours, whose own parameters stay where the setting says nothing; its tokenizer, chat
            template and dtypes are every method's.
    """
    if method.merge_method == OURS:
        assert recipe is not None
        merged, own = (recipe.parameters or {}) | setting, recipe.model_copy(deep=True)
        for model in own.models or []:  # whose own parameters count before the recipe's
            model.parameters = {
                k: v for k, v in (model.parameters or {}).items() if k not in setting
            } or None
        return own.model_copy(update={"parameters": merged or None})
    scopes = {p.name: p.scope for p in merge_methods.get(method.merge_method).spec.parameters}
    per_model = {
        k: v for k, v in setting.items() if k in scopes and scopes[k] != ParameterScope.SHARED
    }
    shared = {k: v for k, v in setting.items() if k in scopes and k not in per_model}
    if method.merge_method == "linear":
        per_model["weight"] = 1.0
    models: list[dict[str, Any]] = [
        {"model": m, "parameters": per_model | ({"weight": setting[k]} if k in setting else {})}
        for m, k in zip(experts, weights_of(len(experts)), strict=True)
    ]
    if method.merge_method == "linear":
        models.append({"model": base, "parameters": {"weight": setting.get(BASE_WEIGHT, 0.0)}})
    # mergekit takes config and tokenizer from the base, and where none is named from any model
    kept = {"dtype": dtype} | (settings_of(recipe) if recipe is not None else {})
    data: dict[str, Any] = {
        "merge_method": method.merge_method,
        "base_model": base,
        "models": models,
        **kept,
    }
    if shared:
        data["parameters"] = shared
    return MergeConfiguration.model_validate(data)


def methods_of(
    names: Sequence[str], n_experts: int, recipe: MergeConfiguration | None
) -> tuple[Method, ...]:
    """The methods by name.

    Raises:
        UserError: an unknown name, or ours without a recipe.
    """
    known = peers(n_experts)
    if recipe is not None:
        known = {OURS: ours(recipe)} | known
    for name in names:
        if name not in known:
            alike = get_close_matches(name.lower(), known, n=1)
            meant = f"did you mean '{alike[0]}'? " if alike else ""
            raise UserError(f"unknown method '{name}'; {meant}known are {', '.join(known)}")
    return tuple(known[name] for name in names)


def as_long_as(method: Method, fit: Fit | None) -> Method:
    """A peer that learns step by step, with as many steps and prompts a step as a fit took.

    Args:
        method: which; others stay as they are.
        fit: of our merge; None leaves the peer its own number of steps.
    """
    if fit is None or not AS_A_FIT.keys() <= method.untuned.keys():
        return method
    taken = {"steps": fit.history[-1].step, "prompts_a_step": fit.prompts_a_step}
    grid = tuple(setting | taken for setting in method.grid)
    return replace(method, untuned=method.untuned | taken, grid=grid)


def read_grid(path: Path, methods: Mapping[str, Method]) -> dict[str, tuple[Setting, ...]]:
    """A file that replaces grids: ``ties: {density: [0.2, 0.5], lambda: [1.0]}``.

    Raises:
        UserError: unreadable; a method that is not compared; a parameter it does not have.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"grid {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"grid {path}: expected METHOD: {{PARAMETER: [VALUES]}}")
    grids = {}
    for name, values in data.items():
        if name not in methods or methods[name].aim:
            known = ", ".join(n for n, m in methods.items() if not m.aim)
            raise UserError(f"grid {path}: '{name}' is not compared; compared are {known}")
        if not isinstance(values, dict):
            raise UserError(f"grid {path}: {name}: expected {{PARAMETER: [VALUES]}}")
        allowed = _parameters(methods[name])
        for key, listed in values.items():
            if key not in allowed:
                raise UserError(
                    f"grid {path}: {name} has no parameter '{key}'; it has {', '.join(allowed)}"
                )
            if not isinstance(listed, list) or not listed:
                raise UserError(f"grid {path}: {name}: {key}: expected a list of values")
            _check_values(f"grid {path}: {name}: {key}", methods[name], key, listed)
        grids[name] = tuple(methods[name].untuned | chosen for chosen in product(**values))
    return grids


def _check_values(where: str, method: Method, key: str, listed: Sequence[Any]) -> None:
    """Refuse values of another kind than a peer's own; mergekit checks those of its methods.

    Raises:
        UserError: names the value.
    """
    if method.peer is None and not method.searched:
        return
    truth = isinstance(method.untuned[key], bool)
    for value in listed:
        if isinstance(value, bool) != truth or not isinstance(value, int | float):
            kind = "true or false" if truth else "a number"
            raise UserError(f"{where}: {value!r}: expected {kind}")


def _parameters(method: Method) -> list[str]:
    if method.peer is not None or method.searched:
        return list(method.untuned)
    spec = merge_methods.get(method.merge_method).spec
    names = [p.name for p in spec.parameters if p.name != "scores"]
    return [*names, BASE_WEIGHT] if method.merge_method == "linear" else names
