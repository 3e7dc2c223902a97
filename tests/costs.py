"""FLOPs and bytes of a run, counted where they are done, beside what was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.engine.measure import ATTENTION
from mergekit_wp.costs.forecast import counted
from mergekit_wp.costs.work import Costs
from mergekit_wp.models.streaming import Rows, Span
from tests.test_scoring import Quiet


class Counting(TorchDispatchMode):
    """FLOPs of all products; torch's own counter hooks modules, which autograd.grad refuses."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if (attention := ATTENTION.get(packet)) is not None:
            self.total += attention(*(getattr(a, "shape", a) for a in args))
        elif (count := flop_registry.get(packet)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


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
