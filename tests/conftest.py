"""What holds for every test: no deprecated use of anything we depend on."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_warning = logging.Logger.warning


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start hold to the filters of pyproject.toml as well."""
    import mergekit_wp

    here, found = Path(__file__).parents[1], Path(mergekit_wp.__file__).parents[1]
    if here.resolve() != found.resolve():
        raise pytest.UsageError(
            f"these tests are of {here}, but mergekit_wp is imported from {found} (its start-up "
            f"hook imports it before pytest looks here); install this checkout: "
            f"{shlex.join(['pip', 'install', '-e', str(here)])}, or set PYTHONPATH={here}"
        )
    os.environ["PYTHONWARNINGS"] = ",".join(config.getini("filterwarnings"))


@pytest.fixture
def the_working_directory_stays() -> Iterator[None]:
    """Else tests that follow in the same process, and name files from here, do not find them."""
    here = Path.cwd()
    yield
    left = Path.cwd()
    os.chdir(here)
    assert left == here, f"the test left its process in {left}; use monkeypatch.chdir"


@pytest.fixture(autouse=True)
def deprecations_in_logs_are_warnings(
    the_working_directory_stays: None,  # first, so that monkeypatch is undone before it looks
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers says some deprecations by its logger, which our commands tell to be quiet."""

    def warning(self: logging.Logger, message: object, *args: Any, **options: Any) -> None:
        if "deprecated" in str(message):
            warnings.warn(str(message), FutureWarning, stacklevel=_caller_of_transformers())
        _warning(self, message, *args, **options)

    monkeypatch.setattr(logging.Logger, "warning", warning)


def _caller_of_transformers() -> int:
    """Its `stacklevel`, seen from the function that calls this: filters name modules."""
    level = 2
    while str(sys._getframe(level).f_globals["__name__"]).startswith(("transformers", "huggingf")):
        level += 1
    return level
