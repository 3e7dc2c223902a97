"""A family of models: a base, its experts by skill and training seed, and where all of it lies."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click

from benchmarks.files import REPO, local


@dataclass(frozen=True)
class Family:
    """Experts of one base, as one training seed made them.

    Everything is kept in ``build/NAME``; what depends on the seed in ``seed-N`` there, but for
    seed 0.
    """

    name: str
    skills: tuple[str, ...]
    seed: int = 0

    @property
    def here(self) -> str:
        """The benchmark's folder, from the repository's root."""
        return f"benchmarks/{self.name}"

    @property
    def build(self) -> Path:
        """What is the same for every training seed: the base, data, prompts and tasks."""
        return REPO / "build" / self.name

    @property
    def base(self) -> Path:
        """The base's checkpoint."""
        return self.build / "base"

    @property
    def folder(self) -> Path:
        """What belongs to the training seed."""
        return self.build / f"seed-{self.seed}" if self.seed else self.build

    def expert(self, skill: str) -> Path:
        """An expert's checkpoint."""
        return self.folder / "experts" / skill

    def adapter(self, skill: str) -> Path:
        """Its LoRA adapter, if it is one: of seed 0 the committed one, where there is one."""
        committed = REPO / self.here / "adapters" / skill
        if self.seed == 0 and committed.exists():
            return committed
        return self.folder / "adapters" / skill

    def reference(self, skill: str) -> str:
        """What commands are given for an expert: base and adapter, or the checkpoint."""
        adapter = self.adapter(skill)
        if not adapter.exists():
            return local(self.expert(skill))
        return f"{local(self.base)}+{local(adapter)}"

    def prompts(self, skill: str) -> Path:
        """Prompts to score and fit on, with the responses that were learnt."""
        return self.build / "prompts" / f"{skill}.jsonl"

    def task(self, skill: str) -> Path:
        """Validation and test items."""
        return self.build / "tasks" / f"{skill}.jsonl"

    @property
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """All pairs and larger sets of the skills."""
        sizes = range(2, len(self.skills) + 1)
        return tuple(chosen for size in sizes for chosen in combinations(self.skills, size))

    def chosen(self, only: str | None) -> tuple[tuple[str, ...], ...]:
        """The combination of a name such as A-B; all where it is None.

        Raises:
            ClickException: no combination is called so.
        """
        known = {"-".join(experts): experts for experts in self.combinations}
        if only is None:
            return self.combinations
        if only not in known:
            raise click.ClickException(f"'{only}' is no combination; known are {', '.join(known)}")
        return (known[only],)


only_option = click.option("--only", metavar="COMBINATION", help="Only this one, such as A-B.")
