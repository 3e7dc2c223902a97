"""What callers from Python get back: score files in memory, to rank, frame, draw and save."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import refuse_existing, written_whole
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile, write
from mergekit_wp.joint.files import RECIPE, write_company
from mergekit_wp.merging.merge import recipe_of
from mergekit_wp.report.figures import png
from mergekit_wp.report.ranking import RankedComponent, rank, select
from mergekit_wp.report.table import frame
from mergekit_wp.terms import Estimand, Kind

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Picture:
    """A PNG; a notebook shows it inline."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: PathLike) -> None:
        """Write it to a file."""
        with written_whole(Path(path)) as temporary:
            temporary.write_bytes(self.png)


@dataclass(frozen=True, repr=False, eq=False)
class Scores:
    """The scores of one expert: a checked score file in memory.

    Attributes:
        file: manifest and tensors, see docs/file-format.md.
    """

    file: ScoreFile

    def __repr__(self) -> str:
        manifest = self.manifest
        what = ", ".join(f"{e} by {c}" for e in manifest.estimands for c in manifest.criteria)
        return f"Scores('{manifest.behavior}' of {manifest.expert.reference}: {what})"

    @property
    def manifest(self) -> Manifest:
        """Which models and prompts, and how far to trust the scores."""
        return self.file.manifest

    def top(
        self,
        n: int = 20,
        *,
        estimand: str | None = None,
        criterion: str | None = None,
        kind: str | None = None,
    ) -> list[RankedComponent]:
        """The components with the highest scores.

        Args:
            n: how many.
            estimand: of all where None.
            criterion: of all where None.
            kind: of one kind; None ranks the fine partition, so that no weight stands twice.

        Raises:
            UserError: there are no such scores, and which there are; or no such number of them.
        """
        if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
            raise UserError(f"top({n!r:.60}): expected how many, from 1 on")
        selection = select(self.file, estimand, criterion, kind)
        if kind is None:
            fine = tuple(k for k in selection.kinds if k != "layer")
            selection = type(selection)(selection.estimands, selection.criteria, fine)
        return list(rank(self.file, selection, top=n, fine=kind is None).rows())

    def frame(self) -> Any:
        """Every score as a row of a pandas frame, the highest first; needs the extra ``[frame]``.

        Columns: kind, layer, index, name, estimand, criterion, score, se (standard error over
        prompts).

        Raises:
            UserError: pandas is not installed.
        """
        return frame([asdict(row) for row in rank(self.file, select(self.file)).rows()])

    def tensor(self, estimand: Estimand, criterion: str, kind: Kind) -> torch.Tensor:
        """Scores of one kind, float32.

        Returns:
            ``[layers, count]``; ``[layers]`` of kind ``layer``, ``[tensors]`` of kind ``tensor``.

        Raises:
            UserError: there are no such scores; says which there are.
        """
        selection = select(self.file, estimand, criterion, kind)
        return self.file.scores(selection.estimands[0], selection.criteria[0], selection.kinds[0])

    def plot(self) -> Picture:
        """One figure with a row of panels for each estimand and criterion."""
        return Picture(png(self.file))

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write the score file, which appears only when it is complete.

        Raises:
            UserError: there is one already, and it is not to be replaced.
        """
        refuse_existing(Path(path), overwrite)
        write(self.file, Path(path))


class ScoresTogether(Mapping[str, Scores]):
    """The scores of experts that were fitted together, by the experts' names.

    Args:
        files: the score files.
        settings: of the recipe that named the experts: tokenizer, chat template, dtypes.
    """

    def __init__(
        self, files: Mapping[str, ScoreFile], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = dict(settings or {})
        self._scores = {name: Scores(file) for name, file in files.items()}

    def __getitem__(self, name: str) -> Scores:
        """One expert's scores."""
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        """The experts' names."""
        return iter(self._scores)

    def __len__(self) -> int:
        """How many experts."""
        return len(self._scores)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}: {value:.2f}" for name, value in self.answers.items())
        return f"ScoresTogether(answers reproduced {said})"

    @property
    def recoveries(self) -> dict[str, float]:
        """How far each behaviour comes back in the merge, from 0 at the base to 1 at the expert."""
        company = next(iter(self.values())).manifest.company or ()
        return {name: m.recovery for name, m in zip(self, company, strict=True)}

    @property
    def answers(self) -> dict[str, float]:
        """Share of each expert's own answers that the merge gives whole."""
        return {
            name: scores.manifest.fit.reached[scores.manifest.behavior].answers
            for name, scores in self.items()
            if scores.manifest.fit is not None
        }

    def save(self, folder: PathLike, *, overwrite: bool = False) -> Path:
        """Write ``NAME.safetensors`` of every expert, and the recipe that merges by them.

        Returns:
            The recipe.

        Raises:
            UserError: one of them is there already, and it is not to be replaced.
        """
        for name in (RECIPE, *(f"{name}.safetensors" for name in self)):
            refuse_existing(Path(folder, name), overwrite)
        files = {name: scores.file for name, scores in self.items()}
        write_company(Path(folder), files, self.settings)
        return Path(folder, RECIPE)


#: what scores a merge may go by: results of this module, score files, or a recipe
Mergeable = Scores | ScoresTogether | PathLike | Mapping[str, Any] | Sequence[Scores | PathLike]


@contextmanager
def recipe_for(what: Mergeable) -> Iterator[PathLike | Mapping[str, Any]]:
    """A recipe for whatever is to be merged; scores in memory are files while the context lasts."""
    if isinstance(what, Mapping) and not isinstance(what, ScoresTogether):
        yield what
        return
    if isinstance(what, str | os.PathLike):
        yield recipe_of([what]) if os.fspath(what).endswith(".safetensors") else what
        return
    every = [what] if isinstance(what, Scores) else what
    if not isinstance(every, ScoresTogether | Sequence):
        raise UserError(
            f"expected scores, score files, or a recipe, to merge by, not {type(what).__name__}"
        )
    settings: Mapping[str, Any] = {}
    if isinstance(every, ScoresTogether):
        settings, names = every.settings, list(every)
        every = list(every.values())
    else:
        names = [str(number) for number in range(len(every))]
    with TemporaryDirectory() as scratch:
        files: list[PathLike] = []
        for name, one in zip(names, every, strict=True):
            if isinstance(one, Scores):
                path = Path(scratch, f"{name}.safetensors")
                one.save(path)
                files.append(path)
            else:
                files.append(one)
        yield recipe_of(files, settings)


@contextmanager
def recipes_for(what: Sequence[Mergeable]) -> Iterator[tuple[Any, ...]]:
    """The same for several."""
    if not what:
        yield ()
        return
    with recipe_for(what[0]) as first, recipes_for(what[1:]) as others:
        yield (first, *others)
