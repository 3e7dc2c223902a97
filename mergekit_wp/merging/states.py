"""A merge of state dicts in memory: what the merge method does, without mergekit and files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.merging.expert_scores import ExpertScores, check_company
from mergekit_wp.merging.fusion import fuse
from mergekit_wp.merging.method import tensor_gates
from mergekit_wp.merging.parameters import RECORDED, SPEC, refuse_unused

State = Mapping[str, torch.Tensor]
#: one number for all experts, or one for each by its name
PerExpert = float | Mapping[str, float]


def fuse_states(
    base: State,
    experts: Mapping[str, State],
    scores: Mapping[str, ScoreFile],
    *,
    weight: PerExpert = 1.0,
    density: PerExpert = 1.0,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """W = B + Σ gate_e (E_e − B), tensor by tensor, the gates from each expert's scores.

    Args:
        base: parameters by name.
        experts: the same of each expert.
        scores: of each expert.
        weight: factor on an expert's changes.
        density: only its best share of components counts.
        parameters: those that a recipe has for all experts: ``fusion``, ``power``, ``lambda``,
            ``estimand``, ``criterion``, ``granularity``; with a recipe's defaults.

    Returns:
        The merged parameters, in the base's dtypes. Tensors that no scores cover are the base's.

    Raises:
        UserError: names that do not fit; an unknown parameter or a bad value; scores of other
            models, or without what is asked for.
    """
    if experts.keys() != scores.keys():
        raise UserError(
            f"there are experts {', '.join(experts)} and scores of {', '.join(scores)}; give one "
            "of each under every name"
        )
    given = _parameters(parameters, weight, density, list(experts))
    _check_states(base, experts, scores)
    files: dict[Hashable, ExpertScores] = {
        name: ExpertScores(f"of '{name}'", file) for name, file in scores.items()
    }
    check_company(list(files.values()))
    merged = {}
    for name, tensor in base.items():
        gated = tensor_gates(name, files, given, tied=None)
        if gated is None:
            merged[name] = tensor
            continue
        taken = [_tensor(experts[str(e)], str(e), name, tensor) for e in gated.experts]
        for expert, own in zip(gated.experts, taken, strict=True):
            file = files[expert]
            shown_as = f"tensor {name} of '{expert}'"
            file.check_delta(file.scored_name(name, None), tensor, own, shown_as=shown_as)
        merged[name] = fuse(tensor, taken, *gated.layout.spread(gated.gates, tensor.shape))
    return merged


def _check_states(
    base: State, experts: Mapping[str, State], scores: Mapping[str, ScoreFile]
) -> None:
    """Refuse what is no state dict, and a base without anything that was scored.

    Raises:
        UserError: says which.
    """
    for what, state in (("base", base), *((f"expert '{name}'", e) for name, e in experts.items())):
        if not isinstance(state, Mapping):
            raise UserError(
                f"{what}: expected parameters by name, as model.state_dict() gives, not "
                f"{type(state).__name__}"
            )
    for name, file in scores.items():
        names = file.manifest.tensor_names
        if not base.keys() & set(names):
            raise UserError(
                f"base has none of the {len(names)} tensors that the scores of '{name}' name, such "
                f"as {names[0]}; expected parameters by the names of a checkpoint, as the "
                "state_dict() of a whole model that is not compiled gives"
            )


def _parameters(
    parameters: Mapping[str, Any], weight: PerExpert, density: PerExpert, experts: list[str]
) -> dict[str, Any]:
    """As `tensor_gates` takes them: every one, checked as in a recipe."""
    shared = {spec.name: spec for spec in SPEC.shared_parameters}
    if unknown := [name for name in parameters if name not in shared]:
        raise UserError(f"there is no parameter '{unknown[0]}'; there are {', '.join(shared)}")
    try:
        found = {n: s.validate(parameters.get(n, s.default)) for n, s in shared.items()}
        for spec in SPEC.input_parameters:
            if spec.name in (given := {"weight": weight, "density": density}):
                value = given[spec.name]
                by_name = value if isinstance(value, Mapping) else dict.fromkeys(experts, value)
                if by_name.keys() != set(experts):
                    raise UserError(f"'{spec.name}' wants a number for each of {experts}")
                found[spec.name] = {e: spec.validate(by_name[e]) for e in experts}
    finally:
        RECORDED.take()
    refuse_unused(parameters, [found["fusion"]])
    return found


def _tensor(state: State, expert: str, name: str, base: torch.Tensor) -> torch.Tensor:
    if name not in state:
        raise UserError(f"expert '{expert}' has no tensor {name}, which the base has")
    if state[name].shape != base.shape:
        raise UserError(
            f"tensor {name} is {list(state[name].shape)} in expert '{expert}' and "
            f"{list(base.shape)} in the base; only equal shapes can be merged"
        )
    return state[name]
