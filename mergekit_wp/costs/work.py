"""What is counted: work by its kind, memory by what for, and a whole command's plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """Counts by kind of work, each of which has a speed of its own (`calibration`).

    Attributes:
        forward, backward: FLOPs of decoder layers.
        head: FLOPs of the unembedding, either way.
        decoding: FLOPs of answers, token by token.
        steps: of these, each of which all layers take.
        read: bytes of checkpoints.
        passed: numbers that are gone through one by one: differences, mixtures, products.
        written: bytes.
    """

    forward: float = 0.0
    backward: float = 0.0
    head: float = 0.0
    decoding: float = 0.0
    steps: float = 0.0
    read: float = 0.0
    passed: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def flops(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.head + self.decoding


NOTHING = Work()


def total(works: Iterable[Work]) -> Work:
    """Their sum."""
    found = NOTHING
    for work in works:
        found = found + work
    return found


@dataclass(frozen=True)
class Stage:
    """One stage of a command.

    Attributes:
        name: as the progress bar has it.
        work: in all.
        said: what else is worth knowing of it.
        done: whether it was over when the plan was made.
    """

    name: str
    work: Work
    said: str = ""
    done: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes that something takes while memory is fullest; on the device that computes, or not."""

    name: str
    size: float
    on_device: bool = True


@dataclass(frozen=True)
class Costs:
    """What a whole command will take.

    Attributes:
        stages: in order.
        memory: what is held when it is fullest.
        disk: bytes of what is written and stays.
        passing: bytes of what is written and goes again, the most at once.
        notes: what the numbers do not say.
        said: what is told before any run, however short.
    """

    stages: tuple[Stage, ...]
    memory: tuple[Held, ...]
    disk: float
    passing: float = 0.0
    notes: tuple[str, ...] = ()
    said: str = ""

    @property
    def work(self) -> Work:
        """Of all stages."""
        return total(stage.work for stage in self.stages)

    @property
    def left(self) -> Work:
        """Of the stages that are not over."""
        return total(stage.work for stage in self.stages if not stage.done)

    def held(self, *, on_device: bool) -> float:
        """Bytes on the device that computes, or in main memory beside it."""
        return sum(part.size for part in self.memory if part.on_device == on_device)

    def then(self, other: Costs) -> Costs:
        """One command after the other, in one process."""
        fuller = max(self, other, key=lambda c: sum(part.size for part in c.memory))
        return Costs(
            (*self.stages, *other.stages),
            fuller.memory,
            self.disk + other.disk,
            max(self.passing, other.passing),
            (*self.notes, *other.notes),
            "; ".join(part for part in (self.said, other.said) if part),
        )


def fullest(*moments: Iterable[Held]) -> tuple[Held, ...]:
    """What is held at the moment at which it is most."""
    held = (tuple(part for part in moment if part.size) for moment in moments)
    return max(held, key=lambda parts: sum(part.size for part in parts))
