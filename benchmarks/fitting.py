"""Fits as `mergekit-wp fit` does them, in memory, and with one gate a tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mergekit_wp.components import Partition, TensorLayout
from mergekit_wp.engine.gates import Layout
from mergekit_wp.prompts import read_prompts
from mergekit_wp.scoring.fitting import Fitting, State
from mergekit_wp.scoring.journal import Journal
from mergekit_wp.scoring.lessons import guard_of, lesson_of
from mergekit_wp.scoring.members import open_members
from mergekit_wp.scoring.request import FitRequest, Progress


class WholeTensors(Partition):
    """Every tensor is one component: the granularity of AdaMerging."""

    @cached_property
    def layouts(self) -> dict[str, TensorLayout]:
        """Layout by tensor name."""
        fine = Partition(self.dims, self.shapes).layouts
        return {n: TensorLayout(n, part.layer) for n, part in fine.items()}


def fit_by_tensor(request: FitRequest, start: float, progress: Progress) -> tuple[Any, State]:
    """The fit of a request with one gate a tensor.

    Returns:
        The model at the gates kept, and where the fit ended.
    """
    members = open_members(request, request.out.parent, progress)
    coarse = [
        replace(m, pair=replace(m.pair, partition=WholeTensors(p.dims, p.shapes)))
        for m in members
        for p in [m.pair.partition]
    ]
    layout = Layout(coarse[0].pair.partition, tuple(m.pair.changed for m in coarse))
    with TemporaryDirectory() as scratch, Journal(Path(scratch, "out"), {}, False) as journal:
        lessons = [lesson_of(m, journal, progress, request.prompts_a_step) for m in coarse]
        for path in request.guards:
            prompts = read_prompts(path, request.max_prompts)
            lessons.append(guard_of(path, prompts, coarse, request, journal, progress))
        fitting = Fitting(request, coarse, lessons, layout, journal, progress)
        state = fitting.run(torch.full((layout.size,), start, dtype=torch.float64))
    fitting.move_to(state.best)
    return fitting.resident.model, state
