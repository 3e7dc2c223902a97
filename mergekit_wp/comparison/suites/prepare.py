"""From a suite to the comparison that it asks for: its experts are fitted where they were not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import yaml
from pydantic import Field

from mergekit_wp.comparison.compare import CompareOpened
from mergekit_wp.comparison.request import CompareRequest, make_plan
from mergekit_wp.comparison.suites.suite import Suite
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.finished import compared
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.options import Option, Request
from mergekit_wp.prompts import read_prompts
from mergekit_wp.runs.progress import Progress
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.load import Loading
from mergekit_wp.terms import Split

#: in the folder of results: names the experts; the fit
_EXPERTS, _FIT = "experts.yml", "fit"
#: what a suite says, and nobody beside it
WHOLE = ("recipes", "tasks", "prompts")
#: fields of a comparison that a fit has as well
_SHARED = ("device", "restart")


class SuiteRequest(Request):
    """The file from which a comparison may be made in place of recipes and tasks."""

    suite: Annotated[Path | None, Option(exists=True)] = Field(
        default=None,
        description=f"In place of {option('recipes')} and {option('tasks')}: a YAML file that "
        "names base, experts, prompts and tasks (docs/suites.md). The experts are fitted together "
        f"first, once, in {option('out')}.",
    )


def requested(
    suite: str | os.PathLike[str] | None, given: Mapping[str, Any], progress: Progress
) -> CompareRequest:
    """The comparison that is asked for: by a suite, or by its own fields.

    Args:
        suite: the file, or None.
        given: fields of `CompareRequest`; beside a suite without recipes, tasks and prompts.
        progress: told how far a suite's fit is.

    Raises:
        UserError: both or neither is given, or any mistake in it.
    """
    if suite is None:
        if not given["recipes"] or not given["tasks"]:
            raise UserError(
                f"{option('recipes')} and {option('tasks')} say what is compared on what; give "
                f"both, or {option('suite', 'FILE')}"
            )
        return CompareRequest.of(**given)
    if any(given[name] for name in WHOLE):
        raise UserError(
            f"{option('suite', suite)} names the experts, their prompts and the tasks; give none "
            "beside it"
        )
    return prepare(Path(suite), {k: v for k, v in given.items() if k not in WHOLE}, progress)


def prepare(
    path: Path, options: Mapping[str, Any], progress: Progress, *, only_to_plan: bool = False
) -> CompareRequest:
    """The comparison of a suite, after its experts were fitted together.

    Args:
        path: the suite's file.
        options: fields of `CompareRequest` that override the suite's; ``out`` among them.
        progress: told how far the fit is.
        only_to_plan: where there is no fit yet, `progress` ends the run when it is told of its
            cost; what would be written before that goes elsewhere.

    Raises:
        UserError: any mistake in the suite or the options; the folder holds another suite's fit.
    """
    if (given := options.get("out")) is None:
        raise UserError(f"{option('suite', path)} needs {option('out')}: the fit is kept there")
    out, suite = Path(given), Suite.read(path)
    with naming(path):
        recipe = out / _FIT / RECIPE
        request = suite.compare_request(recipe, **options)
        shared = {key: options[key] for key in _SHARED if key in options}
        fitting = suite.fit_request(
            out / _EXPERTS, out / _FIT, overwrite=bool(shared.get("restart")), **shared
        )
    if recipe.exists() and not fitting.restart:
        if changed := _changed(suite, fitting, out, progress):
            raise UserError(
                f"{out} holds a fit of another suite, or of other settings; changed: "
                f"{', '.join(changed)}; add {option('restart', True)} to begin anew, or choose "
                f"another {option('out')}"
            )
        return request
    check(path, suite, request)
    for line in outlook(path, options).plan.warnings:
        progress.note(line)
    if only_to_plan:
        with TemporaryDirectory() as scratch:
            elsewhere = fitting.model_copy(update={"recipe": Path(scratch, _EXPERTS)})
            _fitted(suite, elsewhere, Path(scratch), progress)
    _fitted(suite, fitting, out, progress)
    return request


def outlook(path: Path, options: Mapping[str, Any]) -> CompareOpened:
    """The comparison that will follow the fit of a suite; nothing is fitted or written.

    Args:
        path: the suite's file.
        options: see `prepare`.

    Raises:
        UserError: any mistake in the suite or the options.
    """
    suite = Suite.read(path)
    with naming(path):
        # by `fusion: path`, as a fit's recipe does
        recipe = suite.recipe | {"parameters": {"fusion": "path"}}
        request = suite.compare_request(recipe, **options)
        plan, _ = make_plan(request, fitted=False)
    return CompareOpened(request, plan)


def check(path: Path, suite: Suite, request: CompareRequest) -> None:
    """Find all prompts and tasks, before hours are spent on the fit.

    Raises:
        UserError: names the suite and the key of what cannot be had.
    """
    for name, expert in suite.experts.items():
        with naming(path, f"experts.{name}.prompts"):
            read_prompts(Path(expert.prompts), None)
    loading = Loading(Checkers.load(request.checkers), request.max_new_tokens, request.batch_size)
    usual: dict[str, Split | None] = {
        "test": "test" if request.untuned else None,
        "validation": "valid",
        "keep": "test",
    }
    for key, split in usual.items():
        for name, specs in getattr(suite, key).items():
            with naming(path, f"{key}.{name}"):
                loading.load(specs, split, texts=key == "keep")


@contextmanager
def naming(path: Path, key: str | None = None) -> Iterator[None]:
    """Have mistakes say in which suite they are, and under which key.

    Raises:
        UserError: one that was raised meanwhile, with that.
    """
    try:
        yield
    except UserError as error:
        where = f"suite {path}" if key is None else f"suite {path}: {key}"
        raise UserError(f"{where}: {error}") from error


def _changed(suite: Suite, request: FitRequest, out: Path, progress: Progress) -> list[str]:
    """What the fit that is there was made of, and this suite's is not.

    Of base and experts the places, of experts, prompts and guards the contents. A base whose
    weights alone have changed is found when the experts are merged into it.
    """
    try:
        before = yaml.safe_load((out / _EXPERTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if before != suite.recipe:
        return ["base or experts"]
    return compared(request, out / _FIT, progress)[1]


def _fitted(suite: Suite, request: FitRequest, out: Path, progress: Progress) -> None:
    with written_whole(out / _EXPERTS) as temporary:
        temporary.write_text(yaml.safe_dump(suite.recipe, sort_keys=False), encoding="utf-8")
    fit(request, progress)
