"""FLOPs and bytes of a run, counted where they are done, beside what was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from benchmarks.engine.measure import Counting
from mergekit_wp.costs.forecast import counted
from mergekit_wp.costs.work import Costs
from mergekit_wp.models.streaming import Rows, Span
from tests.test_scoring import Quiet


@dataclass
class Real:
    """What a run took, from where it knew its inputs on."""

    costs: Costs
    flops: float
    read: float


def real(run: Callable[[Quiet], object], monkeypatch: pytest.MonkeyPatch) -> Real:
    """Run, and count."""
    counting, found = Counting(), []
    read, plain = [0.0], Span.read

    def reading(span: Span, rows: Rows, *, pin: bool = False) -> torch.Tensor:
        part = plain(span, rows, pin=pin)
        read[0] += part.nbytes
        return part

    class Planning(Quiet):
        def plan(self, opened: object) -> None:
            found.append(counted(opened))
            counting.total, read[0] = 0, 0.0

    with monkeypatch.context() as patched:
        patched.setattr(Span, "read", reading)
        with counting:
            run(Planning())
    [costs] = found
    return Real(costs, float(counting.total), read[0])
