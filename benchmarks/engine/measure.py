"""Wall and CPU time, counted FLOPs, and the formulas they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarks.components import Component
from mergekit_wp.components import Partition

T = TypeVar("T")
Shape = Sequence[int]
_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Of one run: seconds on the clock and of the processor, and counted FLOPs."""

    wall: float
    cpu: float
    flops: float

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.wall * factor, self.cpu * factor, self.flops * factor)


def timed(run: Callable[[], T], repeats: int = 1) -> tuple[T, float, float]:
    """What a run returns, and its best wall and CPU time."""
    walls, cpus = [], []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return result, min(walls), min(cpus)


@dataclass
class Spent:
    """Wall and CPU seconds of the parts of a run that count; opening models does not."""

    wall: float = 0.0
    cpu: float = 0.0

    def on(self, run: Callable[[], T], times: float = 1.0, repeats: int = 1) -> T:
        """What a run returns; its time counts so many times, the best of the repeats."""
        found, wall, cpu = timed(run, repeats)
        self.wall += times * wall
        self.cpu += times * cpu
        return found


def _attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(q, _by_head(k, q), _by_head(v, q)))


def _attention_back(grad: Shape, q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(grad, q, _by_head(k, q), _by_head(v, q)))


def _by_head(shape: Shape, q: Shape) -> Shape:
    """The shape of keys or values of every query head: kernels take those of groups as well."""
    return (shape[0], q[1], *shape[2:])


#: torch counts no attention on CPUs, and before 2.12 none of heads in groups
ATTENTION = {
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_cudnn_attention: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_backward: _attention_back,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_back,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_back,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}


def counted(run: Callable[[], object]) -> float:
    """FLOPs of a run's matrix products and attention."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return float(counter.get_total_flops())


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


@contextmanager
def profiling() -> Iterator[None]:
    """Print what takes longest in the context, by the processor and by a GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        yield
    for by in ("self_cpu_time_total", *(["self_device_time_total"] if on_gpu else [])):
        print(found.key_averages().table(sort_by=by, row_limit=18), flush=True)


def layer_parameters(partition: Partition) -> int:
    """Parameters of one decoder layer that are multiplied with every token: P."""
    shapes = [partition.shapes[name] for name in partition.layer_tensors(0)]
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def restart_formula(
    partition: Partition, components: Sequence[Component], tokens: int, depth: int
) -> float:
    """Σ 2PN(L − l) over components below the depth."""
    p = layer_parameters(partition)
    levels = [c.layer for c in components if c.layer is not None and c.layer < depth]
    return float(sum(2 * p * tokens * (depth - layer) for layer in levels))


def floor_formula(
    partition: Partition, components: Sequence[Component], tokens: int, depth: int
) -> float:
    """C·P·N·L over components below the depth: the floor of exact sweeps."""
    count = sum(c.layer is not None and c.layer < depth for c in components)
    return float(count * layer_parameters(partition) * tokens * depth)
