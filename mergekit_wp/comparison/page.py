"""The comparison as one offline HTML page."""

from __future__ import annotations

from matplotlib.axes import Axes

from mergekit_wp.comparison import table
from mergekit_wp.comparison.resampling import Resampled, best_peer
from mergekit_wp.comparison.table import Line
from mergekit_wp.report.figures import INK, Drawing, drawing
from mergekit_wp.report.html import filled
from mergekit_wp.report.words import interval

# Okabe and Ito's colours, told apart by the colour-blind
COLOURS = {"ours": "#0072B2", "peer": "#E69F00", "expert": "#009E73", "base": "#999999"}


def html_page(resampled: Resampled, title: str) -> str:
    """The page: summary in words, bars and differences with intervals, table, settings."""
    found = table.lines(resampled)
    shown = [line for line in found if line.mean is not None]
    figures = [_bars(shown), _differences(shown, resampled.comparison.reference)]
    return filled(
        "compare.html",
        title=title,
        what=table.what(resampled.comparison, resampled),
        sentences=sentences(resampled, found),
        figures=[figure for figure in figures if figure is not None],
        tasks=resampled.comparison.tasks,
        reference=resampled.comparison.reference,
        lines=found,
        interval=interval,
        signed=table.signed,
        setting=table.setting_words,
        cost=table.cost_words,
        keeps=any(row.kept for row in resampled.comparison.rows),
        loss=lambda row: table.loss_words(row, resampled.comparison),
    )


def sentences(resampled: Resampled, found: list[Line]) -> list[str]:
    """What came out, in words; nothing is called better unless its interval says so."""
    reference = resampled.comparison.reference
    ours = next(line for line in found if line.row.name == reference)
    said, best = [], best_peer(resampled)
    if ours.mean is not None:
        said.append(f"{reference} reaches {interval(ours.mean)}.")
        for line in found:
            d = line.difference
            if line.mean is None or d is None or line.row.role != "peer":
                continue
            if line.row is best:
                said.append(f"The best peer is {line.row.name} with {interval(line.mean)}.")
        said += _counts(found, reference)
    said += [f"{line.row.name} failed: {line.row.failed}" for line in found if line.row.failed]
    return said


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


def _bars(shown: list[Line]) -> Drawing:
    def draw(ax: Axes) -> None:
        for y, line in enumerate(reversed(shown)):
            assert line.mean is not None
            ax.barh(y, line.mean.value, color=COLOURS[line.row.role], height=0.7)
            ax.plot([line.mean.low, line.mean.high], [y, y], color=INK, lw=1.2)
        ax.set_yticks(range(len(shown)), [line.row.name for line in reversed(shown)])
        ax.set_xlim(left=0)
        ax.set_xlabel("mean over tasks, 95% interval")

    names = ", ".join(f"{x.row.name} {x.mean.value:.2f}" for x in shown if x.mean)
    size = (5.6, 0.24 * len(shown) + 0.9)
    return drawing("Mean over tasks", f"Bars: {names}", draw, "bars", size)


def _differences(shown: list[Line], reference: str) -> Drawing | None:
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

    size = (5.6, 0.24 * len(compared) + 0.9)
    alt = "Paired differences with 95% intervals; a filled point's interval excludes zero"
    return drawing(f"Paired differences from {reference}", alt, draw, "differences", size)
