"""Progress on stderr: one bar a stage, in units of real cost."""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm import tqdm


class BarProgress:
    """A tqdm bar per stage, weighted by cost; its ETA is the average rate of this run's own work.

    Away from a terminal (logs, pipes) a line appears once a minute instead.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._live = sys.stderr.isatty()
        self._pace = {
            "mininterval": 0.2 if self._live else 60,
            "delay": 0 if self._live else 60,
        }

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
        if self._bar is None:
            return
        if resumed:
            self._bar.initial += amount
            self._bar.n += amount
            if self._live:
                self._bar.refresh()
        else:
            self._bar.update(amount)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._live:
            tqdm.write(f"mergekit-wp: {text}", file=sys.stderr)
        else:  # tqdm.write would draw the waiting bar as well
            print(f"mergekit-wp: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the present bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress(Protocol):
    """Where a run reports how far it is."""

    def stage(self, name: str, total: float, unit: str) -> None:
        """A new stage of `total` units begins."""

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Units done; `resumed` ones were done by an earlier run."""

    def note(self, text: str) -> None:
        """Something the user should know."""
