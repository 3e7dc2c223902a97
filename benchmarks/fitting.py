"""Fits as `mergekit-wp fit` does them, in memory, and with one gate a tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from mergekit_wp.components import Partition, TensorLayout
from mergekit_wp.joint.ascent import FitState, Fitting
from mergekit_wp.joint.fit import split_of
from mergekit_wp.joint.gates import Layout
from mergekit_wp.joint.members import measure, open_members
from mergekit_wp.joint.merged_model import MergedModel
from mergekit_wp.joint.objective import guard_of, objective_of
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.models.encoding import today
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import read_prompts
from mergekit_wp.runs.journal import Unwritten
from mergekit_wp.runs.progress import Progress


class WholeTensors(Partition):
    """Every tensor is one component: the granularity of AdaMerging."""

    @cached_property
    def layouts(self) -> dict[str, TensorLayout]:
        """Layout by tensor name."""
        fine = Partition(self.dims, self.shapes).layouts
        return {n: TensorLayout(n, part.layer) for n, part in fine.items()}


def fit_by_tensor(request: FitRequest, start: float, progress: Progress) -> tuple[Any, FitState]:
    """The fit of a request with one gate a tensor.

    Returns:
        The model at the gates kept, and where the fit ended.
    """
    members = open_members(request, request.out, progress, today())
    coarse = [
        replace(
            m, run=replace(m.run, pair=replace(m.pair, partition=WholeTensors(p.dims, p.shapes)))
        )
        for m in members
        for p in [m.pair.partition]
    ]
    layout = Layout(coarse[0].pair.partition, tuple(m.pair.changed for m in coarse))
    size = request.prompts_a_step or 16
    with Unwritten() as journal:
        objectives, guards = [], []
        for member in coarse:
            split = split_of(request, len(member.prompts.prompts))
            references = measure(member, journal, size, split.judged)
            objectives.append(objective_of(member, references, split))
        for guard in request.guards:
            prompts = read_prompts(guard, request.max_prompts)
            asked = coarse[0].run.asking(prompts)
            split = split_of(request, len(prompts.prompts))
            guards.append(guard_of(asked, journal, size, math.log(request.limit), split))
        pairs, at_once = [m.pair for m in coarse], AtOnce(size, progress.note)
        together = len(objectives) + len(guards)
        model = MergedModel(coarse[0].run.load(), pairs, layout, at_once, together)
        fitting = Fitting(request, model, objectives, guards, layout, journal, progress)
        state = fitting.run(torch.full((layout.size,), start, dtype=torch.float64))
    model.move_to(state.kept)
    return model.resident.model, state
