"""The comparison as one offline HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from mergekit_wp.comparison import table
from mergekit_wp.comparison.resampling import Resampled, best_peer
from mergekit_wp.comparison.table import Line
from mergekit_wp.report.figures import FIXED, INK, page_svg
from mergekit_wp.report.html import filled

# Okabe and Ito's colours, told apart by the colour-blind
COLOURS = {"ours": "#0072B2", "peer": "#E69F00", "expert": "#009E73", "base": "#999999"}
_MARKS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class _Figure:
    title: str
    alt: str
    svg: Markup


def html_page(resampled: Resampled, title: str) -> str:
    """The page: summary in words, bars with intervals, radar or bars by task, table, settings."""
    found = table.lines(resampled)
    shown = [line for line in found if line.mean is not None]
    figures = [_bars(shown), _differences(shown, resampled.comparison.reference)]
    if len(resampled.comparison.tasks) >= 3:
        figures.append(_radar(resampled, shown))
    figures.append(_matrix(resampled, shown))
    return filled(
        "compare.html",
        title=title,
        what=table.what(resampled.comparison, resampled),
        sentences=sentences(resampled, found),
        figures=[figure for figure in figures if figure is not None],
        tasks=resampled.comparison.tasks,
        reference=resampled.comparison.reference,
        lines=found,
        interval=table.interval,
        signed=table.signed,
        setting=table.setting_words,
    )


def sentences(resampled: Resampled, found: list[Line]) -> list[str]:
    """What came out, in words; nothing is called better unless its interval says so."""
    reference = resampled.comparison.reference
    ours = next(line for line in found if line.row.name == reference)
    said = []
    if ours.mean is not None:
        said.append(f"{reference} reaches {table.interval(ours.mean)}.")
        for line in found:
            d = line.difference
            if line.mean is None or d is None or line.row.role != "peer":
                continue
            if line.row.name == _name(best_peer(resampled)):
                said.append(f"The best peer is {line.row.name} with {table.interval(line.mean)}.")
        said += _counts(found, reference)
    said += [f"{line.row.name} failed: {line.row.failed}" for line in found if line.row.failed]
    return said


def _name(row: Any) -> str:
    return "" if row is None else str(row.name)


def _counts(found: list[Line], reference: str) -> list[str]:
    peers = [line for line in found if line.row.role == "peer" and line.difference is not None]
    by_verdict: dict[str, list[str]] = {"worse": [], "unclear": [], "better": []}
    for line in peers:
        assert line.difference is not None
        by_verdict[line.difference.verdict].append(line.row.name)
    words = {
        "worse": f"{reference} is better, with the interval of the paired difference above zero, "
        "than",
        "unclear": f"No clear difference between {reference} and",
        "better": f"{reference} is worse, with the interval below zero, than",
    }
    return [f"{words[v]} {', '.join(names)}." for v, names in by_verdict.items() if names]


def _bars(shown: list[Line]) -> _Figure:
    def draw(ax: Axes) -> None:
        for y, line in enumerate(reversed(shown)):
            assert line.mean is not None
            ax.barh(y, line.mean.value, color=COLOURS[line.row.role], height=0.7)
            ax.plot([line.mean.low, line.mean.high], [y, y], color=INK, lw=1.2)
        ax.set_yticks(range(len(shown)), [line.row.name for line in reversed(shown)])
        ax.set_xlim(left=0)
        ax.set_xlabel("mean over tasks, 95% interval")

    names = ", ".join(f"{x.row.name} {x.mean.value:.2f}" for x in shown if x.mean)
    svg = page_svg(draw, "bars", (5.6, 0.24 * len(shown) + 0.9))
    return _Figure("Mean over tasks", f"Bars: {names}", Markup(svg))


def _differences(shown: list[Line], reference: str) -> _Figure | None:
    compared = [line for line in shown if line.difference is not None]
    if not compared:
        return None

    def draw(ax: Axes) -> None:
        for y, line in enumerate(reversed(compared)):
            assert line.difference is not None
            d = line.difference.estimate
            colour = COLOURS[line.row.role]
            ax.plot([d.low, d.high], [y, y], color=colour, lw=2)
            filled = colour if line.difference.verdict != "unclear" else "white"
            ax.plot(d.value, y, "o", color=colour, markerfacecolor=filled, ms=5)
        ax.axvline(0, color=INK, lw=0.8)
        ax.set_yticks(range(len(compared)), [line.row.name for line in reversed(compared)])
        ax.set_xlabel(f"difference from {reference}".replace("$", r"\$"))

    svg = page_svg(draw, "differences", (5.6, 0.24 * len(compared) + 0.9))
    alt = "Paired differences with 95% intervals; a filled point's interval excludes zero"
    return _Figure(f"Paired differences from {reference}", alt, Markup(svg))


def _radar(resampled: Resampled, shown: list[Line]) -> _Figure:
    tasks = resampled.comparison.tasks
    best = _name(best_peer(resampled))
    chosen = [
        line for line in shown if line.row.name in (resampled.comparison.reference, best, "base")
    ]
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    ring = np.append(angles, angles[0])

    def draw(ax: Axes) -> None:
        ceiling = [max(x.tasks[t].value for x in shown if x.row.role == "expert") for t in tasks]
        ax.plot(ring, [*ceiling, ceiling[0]], color=COLOURS["expert"], lw=1, ls=":")
        for mark, line in zip(_MARKS, chosen, strict=False):
            values = [line.tasks[task].value for task in tasks]
            style = "--" if line.row.role == "peer" else "-"
            ax.plot(
                ring,
                [*values, values[0]],
                marker=mark,
                ls=style,
                color=COLOURS[line.row.role],
                label=line.row.name,
            )
        ax.set_xticks(angles, tasks)
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), fontsize="small", framealpha=0)

    svg = page_svg(draw, "radar", (4.4, 4.6), polar=True)
    names = " and ".join(line.row.name for line in chosen)
    return _Figure("By task (dotted: the best expert)", f"Radar of {names}", Markup(svg))


def _matrix(resampled: Resampled, shown: list[Line]) -> _Figure:
    tasks = resampled.comparison.tasks

    def draw(ax: Axes) -> None:
        values = np.array([[line.tasks[task].value for task in tasks] for line in shown])
        ax.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=max(1.0, values.max()))
        for (y, x), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 * max(1.0, values.max()) else "black"
            text = ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
            text.set_gid(FIXED)
        ax.set_xticks(range(len(tasks)), tasks)
        ax.set_yticks(range(len(shown)), [line.row.name for line in shown])

    svg = page_svg(draw, "matrix", (max(4.0, 2.6 + 0.8 * len(tasks)), 0.24 * len(shown) + 0.7))
    return _Figure("Every method on every task", "The numbers of the table below", Markup(svg))
