"""Blocks of a sweep as tasks of a Ray cluster; every worker holds a copy of the model.

Workers read the checkpoints from the same paths as the driver, and refuse other weights. A block's
result does not depend on which worker computes it, or when, so the score file is that of a single
process, bit by bit, where the machines are alike: workers use as many threads as the driver. The
exception is a worker that runs out of memory and goes on with fewer sequences at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from mergekit_wp.architectures import register
from mergekit_wp.components import Partition
from mergekit_wp.criteria import Criteria
from mergekit_wp.errors import UserError, option
from mergekit_wp.interrupts import finishing, stopping
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.models.model_names import absolute
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.placement import MaxMemory
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Recordings, Result
from mergekit_wp.runs.references import References
from mergekit_wp.scoring.blocks import Block
from mergekit_wp.scoring.measure import measure

#: a block that has ended so many workers is given up
ATTEMPTS = 3
#: seconds between looks at whether the user wants to stop
PATIENCE = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Assignment:
    """Everything a worker needs to compute the driver's blocks."""

    base: str
    expert: str
    weights_sha256: tuple[str, str]
    partition: Partition
    delta_norm: dict[str, float]
    dtype: torch.dtype
    device: str
    max_memory: MaxMemory | None
    threads: int
    references: References
    criteria: Criteria
    batch_size: int

    @classmethod
    def of(cls, recordings: Recordings, at_once: AtOnce) -> Assignment:
        """The driver's own, on the CPU."""
        resident = recordings.resident
        pair = resident.pair
        return cls(
            base=absolute(pair.base.name),
            expert=absolute(pair.expert.name),
            weights_sha256=(pair.base.weights_sha256(), pair.expert.weights_sha256()),
            partition=pair.partition,
            delta_norm=pair.delta_norm,
            dtype=resident.dtype,
            device=str(torch.device(resident.device).type),
            max_memory=resident.max_memory,
            threads=torch.get_num_threads(),
            references=moved(recordings.references, "cpu"),
            criteria=recordings.criteria,
            batch_size=at_once.size,
        )

    def recordings(self) -> Recordings:
        """Open the checkpoints and load the model.

        Raises:
            UserError: other weights than the driver's under the same paths.
        """
        torch.set_num_threads(self.threads)
        if self.partition.dims.architecture.mapped:  # another package may have declared it
            register(self.partition.dims.architecture)
        base, expert = Checkpoint(self.base), Checkpoint(self.expert)
        for checkpoint, want in zip((base, expert), self.weights_sha256, strict=True):
            if checkpoint.weights_sha256() != want:
                raise UserError(
                    f"'{checkpoint.name}' has other weights on {socket.gethostname()} than where "
                    "the run was started; all machines have to read the same checkpoints"
                )
        pair = Pair(base, expert, self.partition, self.delta_norm)
        resident = ResidentModel(pair, self.dtype, self.device, self.max_memory)
        references = moved(self.references, self.device)
        return Recordings(resident, references, self.criteria)


def moved(value: T, device: str) -> T:
    """A copy with all tensors on a device, through dataclasses, lists, tuples and dicts."""
    found: Any = value
    if isinstance(value, torch.Tensor):
        found = value.to(device)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        found = dataclasses.replace(value, **{n: moved(v, device) for n, v in fields.items()})
    elif isinstance(value, dict):
        found = {name: moved(part, device) for name, part in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(moved(part, device) for part in value)
    return found  # type: ignore[no-any-return]


class Worker:
    """What runs in a process of the cluster."""

    def __init__(self, assignment: Assignment) -> None:
        """Nothing is opened yet: a mistake is told by the first block, as it is."""
        self.assignment = assignment
        self._opened: tuple[Recordings, AtOnce] | None = None

    def run(self, block: Block) -> Result:
        """Compute one block."""
        if self._opened is None:
            recordings, told = self.assignment.recordings(), logging.getLogger(__name__).warning
            at_once = AtOnce(self.assignment.batch_size, told, recordings.forget)
            self._opened = recordings, at_once
        result = measure(block, *self._opened)
        return {name: value.cpu() for name, value in result.items()}


class Cluster:
    """The workers of one run.

    Args:
        ray: the module.
        recordings: the driver's, whose model's memory is given back.
        at_once: how many sequences go through a model together.
        progress: told of workers that end.
    """

    def __init__(
        self, ray: ModuleType, recordings: Recordings, at_once: AtOnce, progress: Progress
    ) -> None:
        self.ray, self.progress = ray, progress
        assignment = Assignment.of(recordings, at_once)
        on_gpu = assignment.device == "cuda"
        needs = {"num_gpus": 1} if on_gpu else {"num_cpus": assignment.threads}
        have = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0)
        self.count = int(have // next(iter(needs.values())))
        if self.count < 1:
            what = "a GPU" if on_gpu else f"{assignment.threads} CPUs"
            raise UserError(f"the Ray cluster has no worker with {what}, as this process uses")
        self._assignment = ray.put(assignment)
        self._actor = ray.remote(Worker).options(max_restarts=0, **needs)
        self._idle: list[Any] = []
        recordings.resident.release()

    def run(self, blocks: Sequence[Block], on_result: Callable[[Block, Result], None]) -> None:
        """Compute blocks; results come in whatever order they are done.

        A first Ctrl-C waits for the blocks that workers are at.

        Raises:
            Interrupted: after them.
            RuntimeError: a block ended several workers.
        """
        waiting, attempts = deque(blocks), dict.fromkeys(blocks, 0)
        busy: dict[Any, tuple[Block, Any]] = {}
        with finishing():
            while busy or (waiting and not stopping()):
                while waiting and len(busy) < self.count and not stopping():
                    block = waiting.popleft()
                    attempts[block] += 1
                    worker = self._idle.pop() if self._idle else self._start()
                    busy[worker.run.remote(block)] = (block, worker)
                for done in self.ray.wait(list(busy), timeout=PATIENCE)[0]:
                    block, worker = busy.pop(done)
                    try:
                        result = self.ray.get(done)
                    except self.ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    except self.ray.exceptions.RayActorError as error:
                        self._lost(block.key, attempts[block], error)
                        waiting.appendleft(block)
                        continue
                    self._idle.append(worker)
                    on_result(block, result)

    def _start(self) -> Any:
        return self._actor.remote(self._assignment)

    def _lost(self, key: str, attempts: int, error: Exception) -> None:
        if attempts == ATTEMPTS:
            raise RuntimeError(f"block {key} ended {ATTEMPTS} workers, last: {error}") from error
        self.progress.note(f"a worker has ended; its block {key} is computed again")


@contextmanager
def cluster(recordings: Recordings, at_once: AtOnce, progress: Progress) -> Iterator[Cluster]:
    """Workers on the cluster of RAY_ADDRESS, on a running one of this machine, or on a new one.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = installed()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _reach(os.environ.get("RAY_ADDRESS", ""))
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError) as error:
        raise UserError(f"no Ray cluster can be reached: {error}") from error
    except Exception as error:  # Ray's own word for a node that takes longer than 30 s
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start within its 30 seconds; run the same command again when the machine "
            "is less busy, or start Ray before it"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    try:
        yield Cluster(ray, recordings, at_once, progress)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Refuse a host and port where nobody answers; Ray would try for minutes.

    Raises:
        OSError: names them.
    """
    match = re.fullmatch(r"([^/]+):(\d+)", address)
    if match is None:  # none, `auto`, or a scheme of Ray's own
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise OSError(f"RAY_ADDRESS is {address}: {error.strerror or error}") from error


def installed() -> ModuleType:
    """The module ray.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"{option('ray')} needs Ray, which is not installed: pip install 'mergekit-wp[ray]'"
        ) from error
    module: ModuleType = ray
    return module
