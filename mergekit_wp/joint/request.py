"""What commands about all experts of a recipe are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from mergekit_wp.errors import UserError, option
from mergekit_wp.models.model_names import file_names, place_of
from mergekit_wp.options import Argument, Option, Places
from mergekit_wp.prompts import PromptSource, is_frame, prompt_source
from mergekit_wp.prompts.dataset import pinned_text
from mergekit_wp.prompts.location import HUB
from mergekit_wp.runs.request import PROMPTS_OF_EACH, Overwrite, Restart, RunRequest
from mergekit_wp.terms import GateGranularity


class NamedExperts(Places):
    """A base and its experts, each by a name of the caller's choice, where no recipe names them."""

    base: str
    experts: tuple[tuple[str, str], ...]

    @classmethod
    def listed(cls, base: str, experts: Sequence[str]) -> NamedExperts:
        """Experts by the last names of their folders or repositories, longer where some are alike.

        Raises:
            ValueError: one is given twice.
        """
        names = file_names(experts)
        for name, expert in zip(names, experts, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"expert '{expert}' is given twice; name each once")
        return cls(base=base, experts=tuple(zip(names, experts, strict=True)))

    def arguments(self) -> tuple[str, ...]:
        """BASE and every EXPERT, where a command would call them so."""
        experts = tuple(expert for _, expert in self.experts)
        if file_names(experts) != tuple(name for name, _ in self.experts):
            return ()
        return (self.base, *experts)


class MembersRequest(RunRequest):
    """What commands about all experts of a recipe are asked for.

    ``prompts`` pairs a name of an expert with its prompts.
    """

    recipe: Annotated[Path | NamedExperts, Argument(path="any")] = Field(
        description="Names the base and its experts; or these themselves, BASE EXPERT EXPERT ..."
    )
    prompts: Annotated[tuple[tuple[str, PromptSource], ...], Option(metavar="EXPERT=SOURCE")] = (
        Field(description=PROMPTS_OF_EACH)
    )

    cache: Annotated[str | None, Option(metavar="SIZE", stored=False)] = Field(
        default=None,
        description="Main memory in which base and experts are kept, as much of them as fits, as "
        "in 20GiB; else a step reads them from their files.",
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _of_the_only_one(cls, given: Any, info: ValidationInfo) -> Any:
        """A source without a name is of the only expert."""
        experts: tuple[tuple[str, str], ...] = getattr(info.data.get("recipe"), "experts", ())
        match given:
            case (str(source),) if len(experts) == 1 and "=" not in source.partition("?")[0]:
                return ((experts[0][0], prompt_source(source)),)
        return given

    @field_validator("cache")
    @classmethod
    def _size(cls, given: str | None) -> str | None:
        if given is not None and _bytes(given) is None:
            raise UserError(
                f"{option('cache', given)}: expected a size in KiB, MiB, GiB, KB, MB or GB, as in "
                "20GiB"
            )
        return given

    @property
    def cache_size(self) -> int | None:
        """Bytes; None without a cache."""
        return None if self.cache is None else _bytes(self.cache)

    @field_validator("recipe", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """Arguments of a command: a recipe, or a base and its experts."""
        if not isinstance(given, tuple):
            return given
        base, *experts = map(os.fspath, given)
        return NamedExperts.listed(base, experts) if experts else Path(base)


def _bytes(text: str) -> int | None:
    from mergekit_wp.models.placement import parse_size  # which takes long to import

    return parse_size(text)


class FitRequest(MembersRequest):
    """Everything `mergekit-wp fit` is asked for.

    ``out`` is a folder; None writes nothing. ``start`` is "scores" or a number; ``held_out`` is the
    part of the prompts that is only looked at.
    """

    command: ClassVar[str] = "fit"

    out: Annotated[Path | None, Option(path="folder")] = Field(
        default=None,
        description="Folder to write into: a score file for each expert, and a recipe that merges "
        "by them. A killed run goes on where it was.",
    )
    guards: Annotated[
        tuple[PromptSource, ...], Option(flag="guard", metavar="SOURCE", path="any")
    ] = Field(
        default=(),
        description="Prompts on which the merge is to stay like the base; may be given several "
        "times. Without any, a few lines of plain text that the package brings are the guard.",
    )
    unguarded: bool = Field(default=False, description="Fit without any guard.")
    limit: float = Field(
        default=1.01,
        gt=1,
        allow_inf_nan=True,  # to say what is meant by it
        description="What guards allow: how many times the base's perplexity the merge may have "
        "there, on what the base itself would write.",
    )
    limit_of: Annotated[
        tuple[tuple[str, Annotated[float, Field(gt=1)]], ...],
        Option(metavar="GUARD=NUMBER"),
    ] = Field(
        default=(),
        description=f"What one guard allows, in place of {option('limit')}; once per guard, by its "
        "file's name without the ending, as in requests=1.05.",
    )
    front: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        default=(),
        description=f"Further limits, each larger than the one before and than {option('limit')}: "
        "at the end the fit goes on under each of them, and the files say what it would buy. Their "
        "gates stay those of the first limit; guards with a limit of their own keep it.",
    )
    granularity: GateGranularity = Field(
        default="channel",
        description="What one gate covers: a whole component, each of its slices of a matrix, one "
        "channel (a row or a column of a slice, an entry of a norm), or a row and a column of a "
        "matrix, whose gates are added.",
    )
    shrinkage: float = Field(
        default=48.0,
        ge=0,
        description="Pull of every gate towards the mean of its tensor, as strong as so many "
        "prompts a behaviour: with few prompts gates move together, with many each by itself.",
    )
    upper: float = Field(default=1.5, gt=0, description="Largest gate; the smallest is 0.")
    start: Annotated[str, Option(metavar="NUMBER|scores")] = Field(
        default="0.5",
        description="Gates to start from: one number, or those by which RECIPE merges. To go on "
        f"from an earlier fit, give its recipe and {option('start', 'scores')}.",
    )
    steps: int = Field(
        default=600,
        ge=1,
        description="Most steps; a fit ends when there is nothing more to gain. One that was "
        "stopped before ends with what it reached, if it is started again with "
        f"{option('steps', 1)}.",
    )
    rate: float = Field(
        default=0.05,
        gt=0,
        description="How far a gate moves in the first step, about; it falls to a third, twice, "
        "where nothing is gained any more.",
    )
    prompts_a_step: Annotated[
        int | None, Option(default="16, or a quarter of the prompts, but 4")
    ] = Field(
        default=None,
        ge=1,
        description="Prompts of every behaviour in one step. By default no more than a quarter of "
        "those of the behaviour that has the fewest, so that few prompts cost little.",
    )
    held_out: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="Part of the prompts that is only judged by, where a behaviour has at least 64 "
        "of them, and 128 at most. With fewer, the fit is judged by what it is fitted on.",
    )
    restart: Restart = False
    overwrite: Overwrite = False

    @field_validator("start", mode="before")
    @classmethod
    def _text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int | float) else given

    @field_validator("limit_of")
    @classmethod
    def _in_order(cls, given: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple(sorted(given))  # for the same limits are the same fit

    @field_validator("limit")
    @classmethod
    def _finite(cls, given: float) -> float:
        if math.isinf(given):
            raise UserError(
                f"{option('limit', given)}: expected a finite number; for a fit without any limit "
                f"give {option('unguarded', True)}"
            )
        return given


def experts_of(
    base: str | os.PathLike[str] | None,
    experts: Mapping[str, str | os.PathLike[str]] | None,
    recipe: str | os.PathLike[str] | tuple[str, ...] | None,
) -> Path | NamedExperts | tuple[str, ...]:
    """A base and its experts as a caller from Python names them, or a command's arguments.

    Raises:
        UserError: neither these nor a recipe, or both.
    """
    if recipe is not None and base is None and experts is None:
        return recipe if isinstance(recipe, tuple) else Path(place_of(recipe, "recipe"))
    if experts is not None and not isinstance(experts, Mapping):
        raise UserError(
            f"experts are given without names, as {experts!r:.60}; expected them by names of your "
            "choice, as in {'inst': expert}"
        )
    if recipe is not None or base is None or not experts:
        raise UserError(
            "expected a base and its experts by name, as in base, {'inst': expert}; or a recipe "
            "that names them, as recipe=FILE"
        )
    for name in experts:  # each is the name of a file
        if not isinstance(name, str) or not name or "/" in name or os.sep in name or "\0" in name:
            raise UserError(
                f"expert {name!r}: expected a name of your choice without '/', for its score file "
                "is named by it, as in {'inst': expert}"
            )
    named = tuple((name, place_of(expert, f"expert '{name}'")) for name, expert in experts.items())
    return NamedExperts(base=place_of(base, "base"), experts=named)


def guards_of(given: Sequence[Any] | str | os.PathLike[str]) -> tuple[PromptSource, ...]:
    """Guards as a caller from Python gives them: sources in a list, or one by itself.

    Raises:
        UserError: they are none.
    """
    if given is None or is_frame(given):
        raise UserError(
            "guards: expected sources of prompts in a list; leave it out for plain text of the "
            "package's own, or give unguarded=True for none"
        )
    return tuple(map(prompt_source, [given] if isinstance(given, str | os.PathLike) else given))


def by_name(
    prompts: Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str],
) -> tuple[Any, ...]:
    """Prompts of each expert, as pairs; those of an only one may be a source without its name.

    Raises:
        UserError: they are not by name.
    """
    if isinstance(prompts, str | os.PathLike):
        prompts = [os.fspath(prompts)]
    pairs = prompts.items() if isinstance(prompts, Mapping) else prompts
    if isinstance(pairs, Iterable) and not is_frame(pairs):
        pairs = list(pairs)
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise UserError("prompts: expected those of each expert by its name, as in {'inst': [...]}")
    return tuple(  # EXPERT=SOURCE as one text is what a command passes on
        _pinned_pair(pair) if isinstance(pair, str) else (pair[0], prompt_source(pair[1]))
        for pair in pairs
    )


def _is_pair(pair: Any) -> bool:
    named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
    return named or isinstance(pair, str)


def _pinned_pair(pair: str) -> str:
    expert, on_hub, rest = pair.partition(f"={HUB}")
    return f"{expert}={pinned_text(HUB + rest)}" if on_hub else pair
