"""The command that makes a file again, kept in the file with the versions that ran it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import mergekit_wp
from mergekit_wp.roles import Rules
from mergekit_wp.scoring.request import (
    CompanyRequest,
    FitRequest,
    RescoreRequest,
    RunRequest,
    ScoreRequest,
    TraceRequest,
    VerifyRequest,
)

_RUN = ("max_prompts", "batch_size", "dtype", "device", "seed", "max_new_tokens")


@singledispatch
def command_of(request: RunRequest) -> tuple[str, ...]:
    """The arguments of `mergekit-wp` that ask for this, but for the file that it writes.

    A file's content does not depend on where it is put.

    Raises:
        TypeError: no command makes a file from such a request.
    """
    raise TypeError(type(request).__name__)


@command_of.register
def _score(request: ScoreRequest) -> tuple[str, ...]:
    names = {"estimands": "estimand", "criteria": "criterion"}
    own = ("prompts", "behavior", "estimands", "criteria", "kinds", "anchor_layer", "verify")
    options = _options(request, (*own, "share_steps", *_RUN), names)
    return ("score", request.base, request.expert, *options)


@command_of.register
def _company(request: CompanyRequest) -> tuple[str, ...]:
    options = _options(request, ("prompts", "steps", *_RUN), {"steps": "share-steps"})
    return ("score", "--company", str(request.recipe), *options)


@command_of.register
def _fit(request: FitRequest) -> tuple[str, ...]:
    objective = ("prompts", "guards", "guard_weight", "penalty", "upper")
    climb = ("start", "steps", "rate", "prompts_a_step", "held_out")
    run = tuple(name for name in _RUN if name != "batch_size")
    options = _options(request, (*objective, *climb, *run), {"guards": "guard"})
    return ("fit", str(request.recipe), *options)


@command_of.register
def _verify(request: VerifyRequest) -> tuple[str, ...]:
    own = ("top", "task", "checkers", "estimand", "draws")
    return ("verify", *_rescored(request, own))


@command_of.register
def _trace(request: TraceRequest) -> tuple[str, ...]:
    rules = _options(request.rules, tuple(Rules.model_fields), {"suppliers": "min_suppliers"})
    own = _rescored(request, ("targets", "suppliers"))
    return ("trace", str(request.file), *own, *rules)


def _rescored(request: RescoreRequest, own: tuple[str, ...]) -> Iterator[str]:
    prompts = "prompts" if request.behavior is None else "behavior"
    return _options(request, (prompts, *own, "base", "expert", "criterion", *_RUN), {})


def _options(request: BaseModel, fields: tuple[str, ...], names: dict[str, str]) -> Iterator[str]:
    for field in fields:
        for value in _values(getattr(request, field)):
            yield f"--{names.get(field, field).replace('_', '-')}"
            yield value


def _values(value: Any) -> Iterator[str]:
    """What the option is given: nothing for None, several times for paths, commas for names."""
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        for part in value:
            yield str(part) if isinstance(part, Path) else "=".join(map(str, part))
    elif isinstance(value, tuple):
        if value:
            yield ",".join(value)
    elif value is not None:
        yield repr(value) if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Of this package, and of those that the numbers depend on."""
    packages = ("torch", "transformers", "mergekit", "safetensors")
    others = {name: importlib.metadata.version(name) for name in packages}
    return {"mergekit-wp": mergekit_wp.__version__, **others}
