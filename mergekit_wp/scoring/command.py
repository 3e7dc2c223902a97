"""The command that makes a file again, kept in the file: all that its numbers depend on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

from mergekit_wp.scoring.request import CompanyRequest, FitRequest, RunRequest, ScoreRequest

_RUN = ("max_prompts", "batch_size", "dtype", "device", "seed", "max_new_tokens")


@singledispatch
def command_of(request: RunRequest) -> tuple[str, ...]:
    """The arguments of `mergekit-wp` that ask for this, but for ``--out``.

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


def _options(request: RunRequest, fields: tuple[str, ...], names: dict[str, str]) -> Iterator[str]:
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
