"""Ray's calls within this process: every worker has copies of its own of what it is sent."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_wp.runs import cluster
from tests.models import make_model, perturbed, save


class Lost(Exception):
    """A worker that was killed."""


class Wrong(Exception):
    """A mistake within a job."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class LocalRay:
    """A cluster of some CPUs.

    Args:
        cpus: how many.
        dies: whether the worker of a job is killed at it, by the number of jobs begun before.
    """

    def __init__(self, cpus: int, dies: Callable[[int], bool] = lambda _: False) -> None:
        self.cpus, self.dies = cpus, dies
        self.started = self.jobs = self.at_once = 0
        self.exceptions = SimpleNamespace(RayTaskError=Wrong, RayActorError=Lost)

    def init(self, **_: Any) -> None:
        """Nothing is started."""

    def shutdown(self) -> None:
        """Nothing is ended."""

    def nodes(self) -> list[dict[str, Any]]:
        """The one with the CPUs."""
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}]

    def put(self, value: Any) -> Any:
        """As it is sent: Ray's pickle takes functions, too."""
        return deepcopy(value)

    def remote(self, cls: type) -> Any:
        """An actor's class."""
        ray = self

        class Actor:
            @staticmethod
            def options(**_: Any) -> Any:
                return Actor

            @staticmethod
            def remote(assignment: Any) -> Any:
                ray.started += 1
                worker = cls(deepcopy(assignment))

                def begin(job: Any, *shared: Any) -> Callable[[], bytes]:
                    number, sent = ray.jobs, pickle.dumps(job)
                    ray.jobs += 1

                    def result() -> bytes:
                        if ray.dies(number):
                            raise Lost(f"job {number} died")
                        try:
                            args = deepcopy(shared)
                            return pickle.dumps(worker.run(pickle.loads(sent), *args))
                        except Exception as error:
                            raise Wrong(error) from error

                    return result

                return SimpleNamespace(run=SimpleNamespace(remote=begin))

        return Actor

    def wait(self, busy: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """The job begun last is done first."""
        self.at_once = max(self.at_once, len(busy))
        return busy[-1:], busy[:-1]

    def get(self, job: Any) -> Any:
        """Run it now."""
        return pickle.loads(job())


def on(monkeypatch: pytest.MonkeyPatch, ray: LocalRay) -> LocalRay:
    """Have commands use it."""
    monkeypatch.setattr(cluster, "installed", lambda: ray)
    monkeypatch.setattr("mergekit_wp.comparison.compare.installed", lambda: ray)
    return ray


def elsewhere(monkeypatch: pytest.MonkeyPatch, other: Path) -> None:
    """Have workers find another first expert than the driver's."""
    save(perturbed(make_model("llama-tied"), seed=9), other)
    of = cluster.SentModels.of

    def sent(*args: Any) -> Any:
        found = of(*args)
        return type(found)(**(vars(found) | {"experts": (str(other), *found.experts[1:])}))

    monkeypatch.setattr(cluster.SentModels, "of", sent)
