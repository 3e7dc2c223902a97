"""The merge method ``weight_patching`` for mergekit.

Scores of "Weight Patching" (Sun et al., arXiv 2604.13694) say how much each component of an
expert carries its behaviour; every component of the merge takes from each expert as its scores
say. The maths is in `fusion`, score files in `expert_scores`, the recipe's names in `parameters`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    TensorEntry,
    TensorGroup,
)

from mergekit_wp.components import GateLayout
from mergekit_wp.errors import UserError
from mergekit_wp.merging.expert_scores import Choice, ExpertScores, check_company, load
from mergekit_wp.merging.fusion import component_gates, fuse
from mergekit_wp.merging.host import (
    config_of,
    is_tied,
    refuse_unusable,
    shown,
    stored_pair,
    unwritten,
)
from mergekit_wp.merging.parameters import RECORDED, SPEC
from mergekit_wp.terms import Fusion

LOG = logging.getLogger(__name__)


# A tensor that only the base has stays as it is; the recipe as a whole needs an expert.
_TENSOR_CONTRACT = InputContract(base=BasePolicy.REQUIRED)


class Gated(NamedTuple):
    """The gates of one tensor: ``[experts, gates of the tensor]`` float64, and how they lie."""

    experts: tuple[Hashable, ...]
    gates: torch.Tensor
    layout: GateLayout


class _Coverage:
    """Tensors of one run that no score file covers, reported in one line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self._names: set[str] = set()
        self._written: set[str] = set()
        self._uncovered: list[str] = []
        self._scored: dict[str, None] = {}

    def add(self, name: str, covered: bool, written: Iterable[str], scored: Iterable[str]) -> None:
        with self._lock:
            self._names.add(name)
            self._written.update(written)
            self._scored.update(dict.fromkeys(scored))
            if not covered:
                self._uncovered.append(name)

    def report(self) -> None:
        with self._lock:
            names, total = self._uncovered, len(self._names)
            lost = unwritten(self._scored, self._written) if total > 1 else []
            self.reset()
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            LOG.warning(
                "%d of %d tensors have no scores and stay at the base: %s", len(names), total, shown
            )
        if lost:
            LOG.warning(
                "mergekit does not write %d scored tensors of this architecture, the merged model "
                "lacks them: %s",
                len(lost),
                ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else ""),
            )


class WeightPatchingMerge(GroupMergeMethod):  # type: ignore[misc]
    """W = B + λ Σ_e gate_e (E_e − B), the gates from each expert's component scores."""

    spec = SPEC

    def __init__(self) -> None:
        """Start with nothing planned."""
        self._coverage = _Coverage()

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check one tensor's inputs; while planning, also its score files against the base.

        mergekit first calls this once for the whole recipe, with the name of an output slice or
        none: there a plan starts. See `Recorded` for the rest.

        Raises:
            ValueError: no base, or no expert at all.
            UserError: a model listed twice or quantised; a score file of another architecture,
                or without the scores asked for.
        """
        recorded = RECORDED.take()
        if group_name is None or ".slices[" in group_name:
            refuse_unusable(input_ids, base_id)
            super().validate_inputs(input_ids, base_id, group_name=group_name)
            self._coverage.reset()
            return
        _TENSOR_CONTRACT.validate_ids(input_ids, base_id, group_name=group_name)
        others = [model for model in input_ids if model != base_id]
        if not others or "fusion" not in recorded:
            return
        files = [load(path) for path in recorded.get("scores", {})]
        if not files:
            raise UserError(no_scores(others[0]))
        for file in files:
            check_fit(file, base_id, recorded)
        check_company(files)
        self._cover(group_name, files, base_id, recorded["granularity"])

    def _cover(
        self,
        name: str | None,
        files: Sequence[ExpertScores],
        base_id: Hashable | None,
        granularities: Sequence[str] | Mapping[str, None],
    ) -> None:
        tied = is_tied(base_id)
        covered = any(
            file.covers(file.scored_name(name, tied), granularity)
            for file in files
            for granularity in granularities
            if name is not None
        )
        scored = (scored for file in files for scored in file.tensor_names)
        written = (file.scored_name(str(name), tied) for file in files)
        self._coverage.add(str(name), covered, written, scored)

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Bind the parameters of a direct call, which is not planned, and note its coverage."""
        RECORDED.take()
        try:
            bound: list[dict[str, Any]] = super()._bind_parameters(groups, parameters)
        finally:
            RECORDED.take()
        for group, values in zip(groups, bound, strict=True):
            files = [source(values, entry.id) for entry in group.non_base]
            base_id = group.base.id if group.base else None
            self._cover(group.metadata.name, files, base_id, [values["granularity"]])
        return bound

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor.

        Raises:
            UserError: the tensor does not fit a score file, or is of another expert.
        """
        self._coverage.report()
        name, base = group.metadata.name, group.base
        tensor: torch.Tensor = base.tensor
        if name is None:
            raise UserError("weight_patching merges tensors by name; give the tensor's name")
        tied = is_tied(base.id)
        files = {entry.id: source(parameters, entry.id) for entry in group.non_base}
        gated = tensor_gates(name, files, parameters, tied)
        if gated is None:
            return tensor
        experts = []
        for entry in group.non_base:
            if entry.id in gated.experts:
                self._check_delta(group, entry, files[entry.id], tied)
                experts.append(entry.tensor)
        return fuse(tensor, experts, *gated.layout.spread(gated.gates, tensor.shape))

    def _check_delta(
        self, group: TensorGroup, entry: TensorEntry, file: ExpertScores, tied: bool | None
    ) -> None:
        metadata, base = group.metadata, group.base
        name, called = str(metadata.name), shown(str(metadata.name), entry.id)
        names, axis = file.stored_names(name, tied), metadata.vocabulary_axis
        file.check_delta(
            file.scored_name(name, tied),
            base.tensor,
            entry.tensor,
            shown_as=called,
            stored=lambda: stored_pair(names, base, entry, axis, shown_as=called),
        )


def tensor_gates(
    name: str,
    files: Mapping[Hashable, ExpertScores],
    parameters: Mapping[str, Any],
    tied: bool | None,
    *,
    by_component: bool = False,
) -> Gated | None:
    """How much of each expert every part of one tensor takes: no weights are read.

    Args:
        name: the tensor.
        files: the scores of each expert that has it.
        parameters: as mergekit hands them to `WeightPatchingMerge.merge_group`.
        tied: see `is_tied`.
        by_component: of finer gates, the means that components have.

    Returns:
        None where no score file covers the tensor, which then stays at the base.

    Raises:
        UserError: score files that do not fit the parameters or each other.
    """
    fusion: Fusion = parameters["fusion"]
    choice = Choice(
        "path" if fusion == "path" else parameters["estimand"],
        parameters["criterion"],
        parameters["granularity"],
        by_component,
    )
    scored = {expert: file.scored_name(name, tied) for expert, file in files.items()}
    covering = [e for e, file in files.items() if file.covers(scored[e], choice.granularity)]
    if not covering:
        return None
    layouts = [files[e].gate_layout(scored[e], choice) for e in covering]
    if len({(type(layout), layout.count) for layout in layouts}) > 1:
        raise UserError(
            f"tensor {name}: its score files are of different architectures or granularities"
        )
    density, weight = parameters["density"], parameters["weight"]
    with torch.device("cpu"):  # a worker of --multi-gpu has its GPU as the default device
        scores = [files[e].scores(scored[e], choice, density[e]) for e in covering]
        gates = component_gates(
            torch.stack(scores),
            torch.tensor([weight[e] for e in covering], dtype=torch.float64),
            fusion=fusion,
            power=parameters["power"],
            scale=parameters["lambda"],
        )
    return Gated(tuple(covering), gates, layouts[0])


def no_scores(expert: Hashable) -> str:
    """The error of a recipe that says nothing about an expert."""
    return (
        f"model {expert} has no 'scores'; give the score file that "
        "'mergekit-wp score BASE EXPERT --prompts FILE.jsonl --out FILE.safetensors' writes"
    )


def source(parameters: Mapping[str, Any], expert: Hashable) -> ExpertScores:
    """What says how much of an expert is taken: its score file.

    Args:
        parameters: as mergekit hands them to `WeightPatchingMerge.merge_group`.
        expert: the model.

    Raises:
        UserError: the recipe gives none.
    """
    scores = parameters["scores"].get(expert, "")
    if not scores:
        raise UserError(no_scores(expert))
    return load(scores)


def check_fit(
    file: ExpertScores, base_id: Hashable | None, recorded: Mapping[str, Mapping[str, None]]
) -> None:
    """Hold a score file against the base's config and the scores that the recipe asks for.

    Raises:
        UserError: another architecture, or scores that the file does not have.
    """
    config = config_of(base_id)
    if config is not None:
        file.require_base(config)
    fusions = recorded["fusion"]
    estimands = [*recorded["estimand"]] if set(fusions) - {"path"} else []
    for estimand in [*estimands, *(["path"] if "path" in fusions else [])]:
        for criterion in recorded["criterion"]:
            for granularity in recorded["granularity"]:
                file.require(Choice(estimand, criterion, granularity))


weight_patching = WeightPatchingMerge()
