"""Parts of a run as jobs of a Ray cluster; every worker holds a copy of the model.

Workers read the checkpoints from the same paths as the driver, and refuse other weights. A job's
result does not depend on which worker computes it, or when, so files are those of a single
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
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from mergekit_wp.architectures import register
from mergekit_wp.components import Partition
from mergekit_wp.errors import UserError, option
from mergekit_wp.interrupts import finishing, stopping
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.model_names import absolute
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.placement import MaxMemory
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.request import DTYPES, RunRequest

#: a job that has ended so many workers is given up
ATTEMPTS = 3
#: seconds between looks at whether the user wants to stop
PATIENCE = 0.5

T = TypeVar("T")


class ClusterJob(Protocol):
    """Something that a worker computes."""

    @property
    def key(self) -> str:
        """What it is called."""
        ...


J = TypeVar("J", bound=ClusterJob)


@dataclass(frozen=True)
class Machine:
    """What a worker takes of its machine: a device, cpu or cuda, or so many threads."""

    device: str
    threads: int

    @classmethod
    def like_here(cls, device: str) -> Machine:
        """As this process does."""
        return cls(str(torch.device(device).type), torch.get_num_threads())


@dataclass(frozen=True)
class SentModels(Machine):
    """A base and experts, by their paths and hashes, and how they are run: what a worker opens."""

    base: str
    experts: tuple[str, ...]
    weights_sha256: tuple[str, ...]
    partition: Partition
    delta_norms: tuple[dict[str, float], ...]
    dtype: torch.dtype
    max_memory: MaxMemory | None

    @classmethod
    def of(cls, request: RunRequest, *pairs: Pair) -> SentModels:
        """The driver's own."""
        base, first = pairs[0].base, pairs[0]
        return cls(
            **vars(Machine.like_here(request.device)),
            base=absolute(base.name),
            experts=tuple(absolute(pair.expert.name) for pair in pairs),
            weights_sha256=tuple(
                side.weights_sha256() for side in (base, *(pair.expert for pair in pairs))
            ),
            partition=first.partition,
            delta_norms=tuple(pair.delta_norm for pair in pairs),
            dtype=DTYPES[request.dtype],
            max_memory=request.max_memory,
        )

    def opened(self) -> list[Pair]:
        """The checkpoints as they are here.

        Raises:
            UserError: other weights than the driver's under the same paths.
        """
        torch.set_num_threads(self.threads)
        if self.partition.dims.architecture.mapped:  # another package may have declared it
            register(self.partition.dims.architecture)
        base, *experts = every = [Checkpoint(name) for name in (self.base, *self.experts)]
        for checkpoint, want in zip(every, self.weights_sha256, strict=True):
            if checkpoint.weights_sha256() != want:
                raise UserError(
                    f"'{checkpoint.name}' has other weights on {socket.gethostname()} than where "
                    "the run was started; all machines have to read the same checkpoints"
                )
        return [
            Pair(base, expert, self.partition, norm)
            for expert, norm in zip(experts, self.delta_norms, strict=True)
        ]

    def loaded(self, pair: Pair) -> ResidentModel:
        """The model that is run."""
        return ResidentModel(pair, self.dtype, self.device, self.max_memory)


@dataclass(frozen=True)
class Assignment(ABC):
    """Everything a worker needs to compute the driver's jobs; tensors are on the CPU."""

    models: Machine

    @abstractmethod
    def begin(self, told: Callable[[str], None]) -> Callable[..., dict[str, Any]]:
        """Open the models.

        Args:
            told: of every step back where memory runs out.

        Returns:
            What computes a job, with what it shares with others; mostly a `Result`.
        """


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
        """Nothing is opened yet: a mistake is told by the first job, as it is."""
        self.assignment = assignment
        self._compute: Callable[..., dict[str, Any]] | None = None

    def run(self, job: ClusterJob, *shared: Any) -> dict[str, Any]:
        """Compute one job.

        Args:
            job: which.
            shared: what it has in common with others, see `Cluster.share`.
        """
        if self._compute is None:
            self._compute = self.assignment.begin(logging.getLogger(__name__).warning)
        return moved(self._compute(job, *shared), "cpu")


class Cluster:
    """The workers of one run.

    Args:
        ray: the module.
        assignment: of every worker.
        progress: told of workers that end.

    Raises:
        UserError: there is not room for one worker.
    """

    def __init__(self, ray: ModuleType, assignment: Assignment, progress: Progress) -> None:
        self.ray, self.progress = ray, progress
        models = assignment.models
        on_gpu = models.device == "cuda"
        needs = {"num_gpus": 1} if on_gpu else {"num_cpus": models.threads}
        what, (need,) = "GPU" if on_gpu else "CPU", needs.values()
        # a worker is within one node
        have = [node["Resources"].get(what, 0) for node in ray.nodes() if node["Alive"]]
        self.count = sum(int(here // need) for here in have)
        if self.count < 1:
            what = "a GPU" if on_gpu else f"{models.threads} CPUs"
            raise UserError(f"the Ray cluster has no worker with {what}, as this process uses")
        self._assignment = ray.put(assignment)
        self._actor = ray.remote(Worker).options(max_restarts=0, **needs)
        self._idle: list[Any] = []

    def share(self, value: object) -> Any:
        """Put a value where every worker finds it, once, for as long as the result is kept."""
        return self.ray.put(value)

    def run(
        self,
        jobs: Sequence[J],
        on_result: Callable[[J, dict[str, Any]], None],
        shared: Callable[[J], Sequence[Any]] = lambda _: (),
        *,
        whole: bool = False,
    ) -> None:
        """Compute jobs; results come in whatever order they are done.

        A first Ctrl-C waits for the jobs that workers are at.

        Args:
            jobs: what to compute.
            on_result: takes a result.
            shared: results of `share` that a job needs.
            whole: a first Ctrl-C waits for all of them: they are of no use one by one.

        Raises:
            Interrupted: after them.
            ChildProcessError: a job ended several workers.
        """
        waiting, attempts = deque(jobs), dict.fromkeys(jobs, 0)
        busy: dict[Any, tuple[J, Any]] = {}
        with finishing():
            while busy or (waiting and (whole or not stopping())):
                while waiting and len(busy) < self.count and (whole or not stopping()):
                    job = waiting.popleft()
                    attempts[job] += 1
                    worker = self._idle.pop() if self._idle else self._start()
                    busy[worker.run.remote(job, *shared(job))] = (job, worker)
                for done in self.ray.wait(list(busy), timeout=PATIENCE)[0]:
                    job, worker = busy.pop(done)
                    try:
                        result = self.ray.get(done)
                    except self.ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    except self.ray.exceptions.RayActorError as error:
                        self._lost(job.key, attempts[job], error)
                        waiting.appendleft(job)
                        continue
                    self._idle.append(worker)
                    on_result(job, result)

    def _start(self) -> Any:
        return self._actor.remote(self._assignment)

    def _lost(self, key: str, attempts: int, error: Exception) -> None:
        if attempts == ATTEMPTS:
            raise ChildProcessError(
                f"{key} ended {ATTEMPTS} workers; what is done is kept; see to it that each has "
                f"memory enough, and start the same command again; last: {error}"
            ) from error
        self.progress.note(f"a worker has ended; its part {key} is computed again")


@contextmanager
def cluster(assignment: Assignment, progress: Progress) -> Iterator[Cluster]:
    """Workers on the cluster of RAY_ADDRESS, on a running one of this machine, or on a new one.

    Args:
        assignment: of every worker.
        progress: told of workers that end.

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
        yield Cluster(ray, assignment, progress)
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


def check_cluster(request: RunRequest) -> None:
    """Refuse what workers cannot do.

    Raises:
        UserError: places that a worker does not have, no limits where several share a machine, or
            Ray is not installed.
    """
    if request.max_memory is not None and set(request.max_memory) - {"0", "cpu"}:
        raise UserError(
            f"{option('max_memory')}: with {option('ray')} every worker has one GPU, which it "
            "calls 0"
        )
    if request.max_memory == {}:
        raise UserError(
            f"{option('device_map')} with {option('ray')} needs {option('max_memory')}: "
            "the workers of one machine do not know of each other what they take"
        )
    installed()


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
