"""What a model is called and where it is, from its reference alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelPath, ModelReference

from mergekit_wp.errors import UserError
from mergekit_wp.models import hub


def last_name(reference: str) -> str:
    """The last part of a reference: of a folder, a Hub repository, or of the adapter behind a +."""
    if not os.path.isdir(reference):
        reference = reference.rpartition("+")[2].partition("@")[0]
    return os.path.basename(reference.rstrip("/"))


def file_names(references: Sequence[str]) -> tuple[str, ...]:
    """What files about models are called: the last names; of models that share one, longer ends.

    They are the shortest that tell the models apart, with ``--`` for ``/`` as in the Hub's cache:
    ``me/math`` and ``you/math`` are ``me--math`` and ``you--math``. Models that nothing tells apart
    keep one name.
    """
    names = [last_name(reference) for reference in references]
    found = list(names)
    for name in names:
        alike = [i for i, other in enumerate(names) if other == name]
        if len(alike) > 1:
            ends = distinct_names([_alone(references[i]) for i in alike])
            for i, end in zip(alike, ends, strict=True):
                found[i] = end.strip("/").replace("/", "--")
    return tuple(found)


def is_called(reference: str, key: str) -> bool:
    """Whether a key is a reference, with or without its revision, or an end of it."""
    alone = _alone(reference).partition("@")[0]
    return key in (reference, reference.partition("@")[0]) or f"/{alone}".endswith(f"/{key}")


def _alone(reference: str) -> str:
    """A folder, or a Hub id or the adapter behind a + with its revision as one part of a path."""
    if os.path.isdir(reference):
        return os.path.abspath(reference)
    model, at, revision = reference.rpartition("+")[2].partition("@")
    return f"{os.path.abspath(model) if os.path.isdir(model) else model}{at}" + revision.replace(
        "/", "-"
    )


def distinct_names(references: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of references that tell the models apart; whole where nothing does."""
    parts = [reference.rstrip("/").split("/") for reference in references]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = tuple("/".join(part[-depth:]) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(references)


def absolute(reference: str) -> str:
    """A reference for processes with another working folder: its folders have whole paths."""
    if os.path.isdir(reference):
        return os.path.abspath(reference)
    parts = reference.split("+")
    return "+".join(os.path.abspath(part) if os.path.isdir(part) else part for part in parts)


def refuse_twice(models: Iterable[ModelReference], base: ModelReference | None) -> None:
    """Refuse models of which two are the same one, however they are written.

    mergekit refuses only the same text twice; written with another path, an expert would count
    double, and the base would be an expert.

    Args:
        models: of one output, as a recipe lists them.
        base: the recipe's.

    Raises:
        UserError: names both.
    """
    seen: dict[object, ModelReference] = {}
    if base is not None:
        seen[place(base)] = base
    listed: set[ModelReference] = set()
    for model in models:
        first = seen.setdefault(place(model), model)
        if model in listed or (first != model and first != base):
            raise UserError(
                f"model {first} is listed twice{_other(first, model)}; list it once, with a "
                "larger 'weight' if that was meant"
            )
        if first != model:
            raise UserError(
                f"the base model {first} is listed among the models as {model}; leave it out, or "
                "write it as 'base_model' does"
            )
        listed.add(model)


def _other(first: ModelReference, again: ModelReference) -> str:
    return "" if first == again else f", the second time as {again}"


def place(model: ModelReference) -> object:
    """Where a model is, the same however it is written: folders, or Hub ids at their commits."""

    def of(path: ModelPath | None) -> object:
        if path is None or os.path.exists(path.path):
            return path and os.path.realpath(path.path)
        try:
            return path.path, hub.cached_commit(path.path, path.revision)
        except HFValidationError:  # no Hub id either; opening it will say so
            return path.path, path.revision

    return of(model.model), of(model.lora)


def place_of(given: Any, what: str) -> str:
    """A path or Hub id, however it is given.

    Args:
        given: by a caller from Python.
        what: it is, for errors.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(given, str | os.PathLike):
        raise UserError(
            f"{what}: expected a path or a Hub id, not {type(given).__name__}; what is in memory "
            "has to be saved first"
        )
    return os.fspath(given)
