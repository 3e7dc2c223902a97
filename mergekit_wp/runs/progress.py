"""Progress on stderr: one bar a stage, in units of real cost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Protocol, Self

from tqdm.auto import tqdm

from mergekit_wp.errors import UserError, spelled
from mergekit_wp.runs.ambient import plain_torch

#: seconds between two lines of a bar away from a terminal
EVERY = 60.0


class BarProgress:
    """A tqdm bar per stage, weighted by cost; its ETA is the average rate of this run's own work.

    Away from a terminal (logs, pipes) a line appears once a minute instead, over all stages, also
    while nothing is counted; a thread prints it between entering and leaving.

    Args:
        flags: how the user calls options, see `errors.spelled`.
        forecast: what to say of the cost of what was opened, if anything; it may end the run.
    """

    def __init__(
        self,
        flags: Mapping[str, str] | None = None,
        forecast: Callable[[object], str | None] = lambda _: None,
    ) -> None:
        self._flags, self._forecast = flags, forecast
        self._bar: tqdm | None = None
        self._live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._pace = {} if self._live else {"mininterval": inf, "delay": inf}  # the thread says
        self._left = threading.Event()
        self._minutes = threading.Thread(target=self._keep_saying, daemon=True)

    def stage(self, name: str, total: float, unit: str) -> None:
        """Begin a stage of `total` units."""
        self.close()
        self._bar = tqdm(
            total=round(total, 3),
            desc=name,
            smoothing=0,
            file=sys.stderr,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.4g}/{total:.4g} "
            + unit
            + "s [{elapsed}<{remaining}]",
            **self._pace,
        )

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Count units; resumed ones do not count towards the rate."""
        if self._bar is None or self._bar.disable:  # by TQDM_DISABLE
            return
        # of what was only about right, for tqdm drops the total of a bar that runs over
        self._bar.total = max(self._bar.total, self._bar.n + amount)
        if resumed:
            self._bar.initial += amount
            self._bar.n += amount
            if self._live:
                self._bar.refresh()
        else:
            self._bar.update(amount)

    def _keep_saying(self) -> None:
        """A line a minute, whatever is being done."""
        while not self._left.wait(EVERY):
            if (bar := self._bar) is not None:
                sys.stderr.write(f"{bar}\n")  # at once: notes come between text and end of a print
                sys.stderr.flush()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        line = f"mergekit-wp: {spelled(text, self._flags)}"
        if self._live:
            tqdm.write(line, file=sys.stderr)
        else:  # tqdm.write would draw the waiting bar as well
            print(line, file=sys.stderr, flush=True)

    def plan(self, opened: object) -> None:
        """Say what it will cost, where that is worth a line."""
        self.close()
        if (said := self._forecast(opened)) is not None:
            self.note(said)

    def close(self) -> None:
        """Finish the present bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        if not self._live:
            self._minutes.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._minutes.is_alive():
            self._minutes.join(timeout=1)
        self.close()


class NotesOnly:
    """Progress of work inside a stage of other work: its notes are told, its own stages are not.

    Args:
        told: of notes.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        self.note = told

    def stage(self, name: str, total: float, unit: str) -> None:
        """Nothing."""

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Nothing."""

    def plan(self, opened: object) -> None:
        """Nothing."""


class NoProgress:
    """Says nothing."""

    def stage(self, name: str, total: float, unit: str) -> None:
        """Nothing."""

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def plan(self, opened: object) -> None:
        """Nothing."""


class Progress(Protocol):
    """Where a run reports how far it is."""

    def stage(self, name: str, total: float, unit: str) -> None:
        """A new stage of `total` units begins."""

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Units done; `resumed` ones were done by an earlier run."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def plan(self, opened: object) -> None:
        """All inputs are opened and checked, and nothing is computed or written yet.

        Args:
            opened: what is known of the run, see `runs.run.Opened`.
        """


@contextmanager
def shown_by(progress: bool | Progress) -> Iterator[Progress]:
    """A bar, nothing, or what the caller brings; meanwhile torch is as a command finds it.

    Raises:
        UserError: that is no place to report to.
    """
    given = not isinstance(progress, bool)
    if given and not all(hasattr(progress, n) for n in ("stage", "advance", "note", "plan")):
        raise UserError(
            "progress: expected True, False, or an object with stage, advance, note and plan, not "
            f"{progress!r:.60}"
        )
    with plain_torch():
        if not isinstance(progress, bool):
            yield progress
        elif progress:
            with BarProgress() as shown:
                yield shown
        else:
            yield NoProgress()
