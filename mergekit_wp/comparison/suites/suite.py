"""A benchmark as data: a base, its experts with their prompts, and what merges are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from mergekit.common import ModelReference
from pydantic import Field, ValidationError, field_validator, model_validator

from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import StrictModel, complaint, parse_yaml
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.prompts.location import Location
from mergekit_wp.terms import DTypeName

#: by the name of a task, the sources and tasks of lm-eval that it is made of
Named = dict[str, tuple[str, ...]]


#: fields of a comparison that are files
_FILES = ("calibration", "checkers", "grid")


class SuiteExpert(StrictModel):
    """An expert, and the prompts that it is fitted on; its own answers are learnt."""

    model: str
    prompts: str


class Generation(StrictModel):
    """How models answer.

    Attributes:
        max_new_tokens: most tokens of an answer whose task says none.
        batch_size: sequences at once; None for a size that fits.
        dtype: of merges, of weights and of activations.
    """

    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    dtype: DTypeName = "float32"


class Suite(StrictModel):
    """Everything that a comparison is made of.

    Attributes:
        base: a folder or a Hub id, ``owner/name@revision``.
        experts: by what they are good at.
        test: what is reported, by the names of columns.
        validation: by the same names what parameters are chosen on, where that is not the
            validation items of the same tasks.
        keep: what a merge should not forget.
        guards: prompts on which a fit stays like the base; without any the package's own.
        generation: how models answer.
        fit: further fields of `FitRequest`.
        compare: further fields of `CompareRequest`.
    """

    base: str
    experts: dict[str, SuiteExpert] = Field(min_length=1)
    test: Named = Field(min_length=1)
    validation: Named = Field(default={})
    keep: Named = Field(default={})
    guards: tuple[str, ...] = ()
    generation: Generation = Generation()
    fit: dict[str, Any] = Field(default={})
    compare: dict[str, Any] = Field(default={})

    @field_validator("test", "validation", "keep")
    @classmethod
    def _tasks(cls, named: Named) -> Named:
        for name, specs in named.items():
            if not specs or "=" in name or "?" in name:
                raise ValueError(
                    f"'{name}': expected a name without '=' and '?', and a list of sources or tasks"
                )
        return named

    @model_validator(mode="after")
    def _apart(self) -> Self:
        """What is chosen on is not what is reported."""
        for name, specs in self.validation.items():
            if name not in self.test:
                raise ValueError(f"validation.{name}: 'test' has no '{name}'")
            for spec in specs:
                for other in (t for tests in self.test.values() for t in tests):
                    one, two = Location.parse(spec), Location.parse(other)
                    same = (one.place, one.config, one.split) == (two.place, two.config, two.split)
                    if same and one.split is not None:
                        raise ValueError(
                            f"validation.{name}: {spec} is what 'test' reports as well; parameters "
                            "have to be chosen on other items"
                        )
        return self

    @classmethod
    def read(cls, path: Path) -> Suite:
        """Read a suite; folders and files beside it are found from anywhere.

        Raises:
            UserError: unreadable, not a suite; names the file and the key.
        """
        try:
            data = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"suite {path} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise UserError(f"suite {path} is no mapping with 'base', 'experts' and 'test'")
        try:
            return cls.model_validate(data)._placed(path.absolute().parent)
        except (ValidationError, UserError) as error:
            said = complaint(error) if isinstance(error, ValidationError) else str(error)
            raise UserError(f"suite {path}: {said}") from error

    def _placed(self, folder: Path) -> Suite:
        def tasks(named: Named) -> Named:
            return {
                name: tuple(_source(spec, folder) for spec in specs)
                for name, specs in named.items()
            }

        experts = {
            name: SuiteExpert(
                model=_model(expert.model, folder), prompts=_source(expert.prompts, folder)
            )
            for name, expert in self.experts.items()
        }
        update = {
            "base": _model(self.base, folder),
            "experts": experts,
            "guards": tuple(_source(guard, folder) for guard in self.guards),
            "compare": {
                key: _source(value, folder) if key in _FILES else value
                for key, value in self.compare.items()
            },
        }
        named = {key: tasks(getattr(self, key)) for key in ("test", "validation", "keep")}
        return self.model_copy(update=update | named)

    @property
    def recipe(self) -> dict[str, Any]:
        """A recipe that names the experts, for the fit."""
        return {
            "merge_method": "task_arithmetic",
            "base_model": self.base,
            "models": [{"model": expert.model} for expert in self.experts.values()],
            "dtype": self.generation.dtype,
        }

    @property
    def prompts(self) -> tuple[tuple[str, str], ...]:
        """Of each expert, by its reference."""
        return tuple((expert.model, expert.prompts) for expert in self.experts.values())

    def fit_request(self, recipe: Path, out: Path, **options: Any) -> FitRequest:
        """The fit of the experts.

        Args:
            recipe: the file that holds `recipe`.
            out: folder for the score files.
            options: fields that override the suite's.

        Raises:
            UserError: a field is unknown or wrong.
        """
        answers = self.generation
        own = {"max_new_tokens": answers.max_new_tokens, "dtype": answers.dtype}
        fields = own | {"guards": self.guards} | self.fit | options
        return FitRequest.of(recipe=recipe, prompts=self.prompts, out=out, **fields)

    def compare_request(self, recipe: Path | dict[str, Any], **options: Any) -> CompareRequest:
        """The comparison.

        Args:
            recipe: that merges by the fit, or the experts' own where there is none yet.
            options: fields that override the suite's, such as ``out``.

        Raises:
            UserError: a field is unknown or wrong.
        """
        tasks = {
            field: tuple(f"{name}={spec}" for name, spec in _pairs(named))
            for field, named in (
                ("tasks", self.test),
                ("validation", self.validation),
                ("keep", self.keep),
            )
        }
        own = self.compare
        if options.get("quick"):  # which chooses methods itself, whatever the suite does
            own = {key: value for key, value in own.items() if key not in ("methods", "grid")}
        if options.get("quick") or options.get("untuned"):  # then nothing is chosen by them
            del tasks["validation"]
        fields = tasks | self.generation.model_dump() | own | options
        return CompareRequest.of(recipes=(recipe,), prompts=self.prompts, **fields)


def _pairs(named: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    return ((name, spec) for name, specs in named.items() for spec in specs)


def _source(written: str, folder: Path) -> str:
    """A source, with the whole path of a file or folder beside the suite."""
    source = Location.parse(str(written))
    beside = folder / source.place
    return source.model_copy(update={"place": str(beside)}).but() if beside.exists() else written


def _model(written: str, folder: Path) -> str:
    """A reference, with the whole paths of folders beside the suite."""

    def placed(path: str) -> str:
        return str(folder / path) if (folder / path).is_dir() else path

    reference = ModelReference.parse(written)
    if (folder / reference.model.path).is_dir() or reference.lora is not None:
        return "+".join(placed(part) for part in written.split("+"))
    return written
