"""Stability of the rankings as sentences and rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from mergekit_wp.files.manifest import Agreement
from mergekit_wp.report import words

_AGAINST = {
    "halves": "halves of the prompts",
    "run": "another run",
    "behavior": "another behaviour",
    "expert": "another expert",
}


def label(found: Agreement) -> str:
    """What the ranking is compared with."""
    name = f": {words.clean(found.name)}" if found.name else ""
    return _AGAINST[found.against] + name


def cells(found: Agreement) -> tuple[str, str]:
    """Rank correlation with its interval, and the overlap of the leaders."""
    return (
        f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]",
        f"{found.jaccard:.2f} of the top {found.top:,}",
    )


def groups(every: Iterable[Agreement], estimand: str, criterion: str) -> Iterator[list[Agreement]]:
    """Comparisons of one estimand and criterion, kinds together."""
    wanted = [one for one in every if (one.estimand, one.criterion) == (estimand, criterion)]
    for _, group in groupby(wanted, key=label):
        yield list(group)


def sentence(group: Iterable[Agreement]) -> str:
    """One comparison, kinds side by side."""
    listed = list(group)
    parts = (f"{words.KIND_WORDS[f.kind]} {cells(f)[0]}, overlap {cells(f)[1]}" for f in listed)
    return f"{label(listed[0])}: {'; '.join(parts)}"
