"""The tables of README.md, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.compiled.methods import METHODS
from benchmarks.compiled.rates import auroc, average_precision, interval, precision_at

Row = dict[str, Any]
#: what float64 rounds off: scores below it count as 0
ROUNDING = 1e-9
#: how far from 1 shares may sum to
WHOLE = 0.1


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def plain(text: str) -> str:
    """A text that ends no cell."""
    return text.replace("|", "\\|")


def everything(rows: Sequence[Row]) -> str:
    """All tables."""
    seen = [row for row in rows if row["active"]]
    parts = [counts(rows, seen)]
    for setting, title in (("compiled", "As compiled"), ("decoys", "With decoys")):
        parts.append(found(seen, setting, title))
    parts += [completeness(seen), claim(seen), circuits(seen)]
    return "\n".join(line for part in parts for line in part)


def counts(rows: Sequence[Row], seen: Sequence[Row]) -> Iterator[str]:
    """How much there is of everything."""
    programs = len({row["program"] for row in rows})
    yield f"{len(rows)} pairs of {programs} programs, {len(rows) - len(seen)} of them left out"
    yield "because what was changed acts on no input.\n"
    for name in ("live", "changed", "active", "passing"):
        sizes = [len(row[name]) for row in seen]
        yield f"- {name}: {np.mean(sizes):.1f} components a pair ({min(sizes)} to {max(sizes)})"
    yield ""


def arrays(row: Row, setting: str, method: str, truth: str) -> tuple[np.ndarray, np.ndarray]:
    """Absolute scores and whether each component is one of the truth."""
    scores = np.abs([row[setting][method][name] for name in row["live"]])
    return np.where(scores < ROUNDING, 0, scores), np.isin(row["live"], row[truth])


def _cell(values: Sequence[float], rows: Sequence[Row]) -> str:
    if not rows:
        return "–"
    value, low, high = interval(np.array(values), [row["program"] for row in rows])
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def found(rows: Sequence[Row], setting: str, title: str) -> Iterator[str]:
    """Every method on the question whether a component is one of those that were changed."""
    yield f"### {title}\n"
    table = []
    norms = [average_precision(*arrays(row, setting, "|Δ|", "active")) for row in rows]
    for method in METHODS:
        own = [arrays(row, setting, method, "active") for row in rows]
        every = [arrays(row, setting, method, "changed") for row in rows]
        precision = [average_precision(*one) for one in own]
        table.append(
            (
                plain(method),
                _cell([auroc(*one) for one in own], rows),
                _cell(precision, rows),
                _cell([p - n for p, n in zip(precision, norms, strict=True)], rows),
                _cell([auroc(*one) for one in every], rows),
            )
        )
    head = ("by", "AUROC", "average precision", plain("that minus |Δ|'s"), "AUROC, all changed")
    yield from markdown(head, table)


def completeness(rows: Sequence[Row]) -> Iterator[str]:
    """Whether the sum of the shares says when they are to be trusted."""
    yield "### Average precision of shares by what they sum to, with decoys\n"
    table = []
    for method in ("share", "share, 100 midpoints"):
        whole = [abs(row["completeness, decoys"][method] - 1) < WHOLE for row in rows]
        cells = []
        for wanted in (True, False):
            some = [row for row, is_whole in zip(rows, whole, strict=True) if is_whole == wanted]
            values = [average_precision(*arrays(row, "decoys", method, "active")) for row in some]
            cells.append(f"{_cell(values, some)} ({len(some)} pairs)")
        table.append((method, *cells))
    yield from markdown(("", f"within {WHOLE} of 1", "not"), table)


def claim(rows: Sequence[Row]) -> Iterator[str]:
    """Weights against activations where others pass the change on."""
    downstream = [row for row in rows if row["passing"]]
    yield f"### Carriers upstream, executors downstream ({len(downstream)} pairs)\n"
    table = []
    for method, weights in METHODS.items():
        cells = []
        for setting in ("compiled", "decoys"):
            values = [
                precision_at(len(row["active"]), *arrays(row, setting, method, "active"))
                for row in downstream
            ]
            cells.append(_cell(values, downstream))
        table.append((plain(method), "weights" if weights else "activations", *cells))
    head = ("by", "of", "precision at k, as compiled", "with decoys")
    yield from markdown(head, table)


def circuits(rows: Sequence[Row]) -> Iterator[str]:
    """Edges and roles of `trace`."""
    traced = [row for row in rows if row["circuit"] is not None]
    yield f"### The circuit\n\n{len(traced)} of {len(rows)} pairs have a target at all.\n"
    judged = [row["circuit"] for row in traced]
    for name, of in (("precision", "found"), ("recall", "wanted")):
        some = [row for row in traced if row["circuit"][of]]
        values = [row["circuit"]["both"] / row["circuit"][of] for row in some]
        yield f"- {name} of edges: {_cell(values, some)} ({len(some)} pairs)"
    yield ""
    roles = Counter(tuple(pair) for one in judged for pair in one["roles"])
    names = ("carrier", "router", "executor")
    table = [
        (f"compiled {own}", *(str(roles[own, name]) for name in names)) for own in (*names, "none")
    ]
    yield from markdown(("", *(f"called {name}" for name in names)), table)
