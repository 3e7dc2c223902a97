"""How far a comparison is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from tqdm.auto import tqdm

from mergekit_wp.errors import spelled


class CompareProgress(Protocol):
    """Where a comparison reports how far it is."""

    def job(self, model: str, done: int, total: int) -> None:
        """A model is measured; `done` jobs of about `total` are known so far."""

    def note(self, text: str) -> None:
        """Something the user should know; it may name options, see `errors.spelled`."""


class ComparisonBar:
    """A bar on stderr, with notes above it.

    Args:
        flags: how the user calls options, see `errors.spelled`.
    """

    def __init__(self, flags: Mapping[str, str] | None = None) -> None:
        self._flags = flags
        self._bar = tqdm(desc="comparing", unit="job", total=1, mininterval=0.5)

    def job(self, model: str, done: int, total: int) -> None:
        """Show the model's name."""
        self._bar.total, self._bar.n = total, done
        self._bar.set_postfix_str(model, refresh=False)
        self._bar.refresh()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(f"mergekit-wp: {spelled(text, self._flags)}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
