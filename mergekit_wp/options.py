"""Requests, and what their fields say of the command line.

A request is what a command, or a caller from Python, asks for. Its fields are the only place where
an option has its type, default, bounds and help; `commands.derive` makes the command line of them,
and `runs.command` the line that makes a file again.

Names from a list are given in commas (``--kinds head,neuron``); files and what is written as
NAME=VALUE once each (``--guard a.jsonl --guard b.jsonl``), for a comma may be in their names.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from mergekit_wp.errors import UserError, option


@dataclass(frozen=True)
class Option:
    """What a field's name and type do not say of its option.

    Attributes:
        flag: its name, where it is not the field's.
        metavar: what stands for its value in ``--help``.
        default: in words, where the field's is None and found out later.
        auto: None is written "auto".
        repeated: it is given once for each value, not with commas.
        instead_of: the field in whose place it may be given.
        path: what may lie at a path that exists.
        exists: whether something has to.
        stored: whether it belongs into the command that a file keeps: the numbers depend on it.
        aliases: other spellings of its values.
        also: another name of it, by which other commands know the same.
    """

    flag: str | None = None
    metavar: str | None = None
    default: str | None = None
    auto: bool = False
    repeated: bool = False
    instead_of: str | None = None
    path: Literal["file", "folder", "any"] = "file"
    exists: bool = False
    stored: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    also: str | None = None


@dataclass(frozen=True)
class Argument(Option):
    """A field that is given by its position."""


#: a field for callers from Python only
INTERNAL = object()


class Request(BaseModel):
    """What is asked for.

    Attributes:
        command: the subcommand of `mergekit-wp` that asks for it.
        writes: the field with the place of the result, on which its content does not depend.
    """

    command: ClassVar[str] = ""
    writes: ClassVar[str] = "out"
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """The request with these fields.

        Raises:
            UserError: names the first field that is wrong.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise _complaint(error) from error

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        found = declared(cls).get(str(info.field_name))
        kind = type(value)
        if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
            value = str(value).removeprefix("torch.")
        return value if found is None else found.plain(value)


class Places(BaseModel):
    """A field's value that is written as several arguments by position, not as an option."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def arguments(self) -> tuple[str, ...]:
        """What is written; nothing where no command can ask for it."""
        raise NotImplementedError


class PrintRequest(Request):
    """How a result is printed."""

    as_json: Annotated[bool, Option(flag="json")] = Field(
        default=False, description="Print one JSON object."
    )


@dataclass(frozen=True)
class Declared:
    """A field of a request, as an option or argument.

    Attributes:
        field: its name; for a field of a nested model ``outer.field``.
        info: pydantic's own record of it.
        option: its marker.
    """

    field: str
    info: FieldInfo
    option: Option

    @cached_property
    def flag(self) -> str:
        """As it is written: ``--max-prompts``, or ``BASE``."""
        name = self.option.flag or self.field.rpartition(".")[2].replace("_", "-")
        return name.upper() if self.positional else f"--{name}"

    @property
    def positional(self) -> bool:
        """Whether it is given by its position."""
        return isinstance(self.option, Argument)

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.info.is_required()

    @property
    def name(self) -> str:
        """The name of the command's parameter: the field's, but where a nested one has its own."""
        outer, _, inner = self.field.rpartition(".")
        return (self.option.flag or inner).replace("-", "_") if outer else inner

    @cached_property
    def type(self) -> Any:
        """Of the field as it is written: not None, nor what only Python can give."""
        return _written(self.info.annotation)

    @property
    def element(self) -> Any:
        """Of a field with several values, the type of one; else None."""
        return _written(get_args(self.type)[0]) if get_origin(self.type) is tuple else None

    @property
    def choices(self) -> tuple[str, ...]:
        """All that may be given, where that is a list of names."""
        of = self.type if self.element is None else self.element
        return get_args(of) if get_origin(of) is Literal else ()

    @property
    def repeated(self) -> bool:
        """Whether it is given once for each value."""
        of = self.element
        return self.option.repeated or of is Path or get_origin(of) is tuple

    @property
    def metavar(self) -> str | None:
        """What stands for its value in ``--help``; None for what its type says."""
        if self.option.metavar or self.repeated:
            return self.option.metavar
        if self.element is not None:
            return "A,B,..."
        if self.option.aliases:
            return "|".join(self.choices)
        return "N|auto" if self.option.auto else None

    def bound(self, name: Literal["ge", "gt", "le", "lt"]) -> Any:
        """One end of the numbers that it takes, or None."""
        return next((getattr(m, name) for m in self.info.metadata if hasattr(m, name)), None)

    def plain(self, value: Any) -> Any:
        """What was written, or a plain value of Python, as the field's type wants it.

        Raises:
            ValueError: it cannot be; says what is wrong, not of which field.
        """
        if self.option.auto:
            return self._number(value)
        if self.option.aliases and isinstance(value, str):
            return self.option.aliases.get(value, value)
        if self.element is None or value is None:
            return value
        if get_origin(self.element) is tuple:
            return tuple(value.items()) if isinstance(value, Mapping) else self._pairs(value)
        if callable(value) or isinstance(value, int | float):
            value = [value]
        elif isinstance(value, str | Path):
            value = [value] if self.repeated or isinstance(value, Path) else self._parts(value)
        if self.repeated:
            return tuple(value)
        if self.choices:
            return self._chosen(list(value))
        return tuple(value) if self.element is float else tuple(dict.fromkeys(value))

    def _pairs(self, values: Any) -> tuple[Any, ...]:
        metavar = str(self.option.metavar)
        what, pairs = metavar.partition("=")[0].lower(), []
        if isinstance(values, str) or not isinstance(values, Iterable):
            values = [values]
        for value in values:
            if not isinstance(value, str | tuple | list):
                raise ValueError(f"{value!r:.60} names no {what}; write {metavar}")
            if isinstance(value, str):
                name, equals, rest = value.partition("=")
                if not equals:
                    raise ValueError(f"'{value}' names no {what}; write {metavar}")
                if (second := _SECOND.search(rest)) and not Path(rest).exists():
                    one, two = f"{name}={rest[: second.start()]}", rest[second.start() + 1 :]
                    raise ValueError(
                        f"'{value}' is several in one; give the option once for each: {one} "
                        f"and {two}"
                    )
                number = _written(get_args(self.element)[1]) is float  # then "=" may be in the name
                value = tuple(value.rsplit("=", 1)) if number else (name, rest)
            pairs.append(value)
        return tuple(pairs)

    def _number(self, value: Any) -> Any:
        if value == "auto":
            return None
        least = self.bound("ge")
        if isinstance(value, str) and (not value.isdecimal() or int(value) < least):
            raise ValueError(f"'{value}' is neither 'auto' nor a whole number from {least}")
        return int(value) if isinstance(value, str) else value

    def _parts(self, text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts and not self.choices:  # else those are named
            raise ValueError(f"'{text}' holds nothing; give one, or several with commas")
        return parts

    def _chosen(self, names: list[Any]) -> tuple[Any, ...]:
        """In the order of the list, so that it does not matter in which they are given.

        Where a caller's own objects are among them, as they are given.
        """
        what, known = self.name.removesuffix("s"), ", ".join(self.choices)
        for name in names:
            if isinstance(name, str) and name not in self.choices:
                raise ValueError(f"unknown {what} '{name}'; choose from {known}")
        if not names:
            raise ValueError(f"no {what} given; choose from {known}")
        if not all(isinstance(name, str) for name in names):
            return tuple(names)
        return tuple(name for name in self.choices if name in names)


def _written(kind: Any) -> Any:
    """Of several types, the first: others are for callers from Python."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


#: where another expert begins in a source; ``?`` begins the source's own keys and values
_SECOND = re.compile(r",(?=[^,=?&]+=)")


@cache
def declared(model: type[BaseModel]) -> dict[str, Declared]:
    """The fields of a request by name, in the order of ``--help`` and of stored commands.

    First what must be given, then the request's own, then what it inherits, then those of rules.
    """
    flat, nested = {}, {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for inner, each in declared(kind).items():
                nested[f"{name}.{inner}"] = replace(each, field=f"{name}.{inner}")
        elif INTERNAL not in info.metadata:
            option = next((m for m in info.metadata if isinstance(m, Option)), Option())
            flat[name] = Declared(name, info, option)
    first = [name for name, each in flat.items() if each.required or each.option.instead_of]
    own = [name for ancestor in model.__mro__ for name in inspect.get_annotations(ancestor)]
    order = [name for name in dict.fromkeys([*first, *own]) if name in flat]
    return {name: flat[name] for name in order} | nested


def _complaint(error: ValidationError) -> UserError:
    """The first thing that is wrong with a request, in one sentence that names the field."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if isinstance(part, str) and part.isidentifier()]
    if not place:
        return UserError(first["msg"].removeprefix("Value error, "))
    name = option(place[-1])
    if first["type"] == "missing":
        return UserError(f"{name} is missing; give it")
    if first["type"] == "extra_forbidden":
        return UserError(f"there is no option {name}; see the help for those there are")
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if first["type"] != "value_error":
        said += f", not {first['input']!r}"
    return UserError(f"{name}: {said}")
