"""The comparison as one offline HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from mergekit_wp.comparison import table
from mergekit_wp.comparison.resampling import Resampled, best_peer
from mergekit_wp.comparison.rows import Comparison, SampleItem
from mergekit_wp.comparison.table import Line
from mergekit_wp.report.figures import INK, PAPER, Drawing, drawing, legend_above
from mergekit_wp.report.html import filled
from mergekit_wp.report.words import clean, interval
from mergekit_wp.terms import RowRole

# Okabe and Ito's colours, told apart by the colour-blind
COLOURS: dict[RowRole, str] = {
    "ours": "#0072B2",
    "peer": "#E69F00",
    "expert": "#009E73",
    "base": "#999999",
}
_ROLES: dict[RowRole, str] = {
    "base": "base",
    "expert": "expert alone",
    "ours": "weight patching",
    "peer": "other method",
}
#: of the best peers, where every setting is a point
_MARKS = {"s": "#E69F00", "^": "#D55E00", "D": "#CC79A7", "v": "#009E73", "P": "#56B4E9"}
#: characters of a question or an answer that are shown
_LONGEST = 240


def html_page(resampled: Resampled, title: str, samples: Sequence[SampleItem] = ()) -> str:
    """The page: summary in words, bars and differences with intervals, samples, table, settings."""
    found = table.lines(resampled)
    shown = [line for line in found if line.mean is not None]
    comparison = resampled.comparison
    figures = [
        _bars(shown, comparison.relative),
        _differences(shown, comparison.reference),
        _trials(shown, comparison),
    ]
    return filled(
        "compare.html",
        title=title,
        what=table.what(comparison, resampled),
        number=_number(comparison.relative),
        warnings=comparison.warnings,
        sentences=sentences(resampled, found),
        figures=[figure for figure in figures if figure is not None],
        samples=[_sample(sample) for sample in samples],
        tasks=comparison.tasks,
        reference=comparison.reference,
        lines=found,
        interval=interval,
        signed=table.signed,
        setting=table.setting_words,
        cost=table.cost_words,
        keeps=any(row.kept for row in comparison.rows),
        compared=any(line.difference for line in found),
        set_by=any(line.row.setting for line in found),
        costs=any(table.cost_words(line.row) for line in found),
        loss=lambda row: table.loss_words(row, comparison),
        equals=None if comparison.bound is None else table.what_is_equal(comparison),
        equal=table.equal_words,
        ends=table.ends(comparison),
    )


def _number(relative: bool) -> str:
    """What a number of the page is, for who sees one for the first time."""
    if relative:
        return (
            "The number is the accuracy relative to the expert: right answers over those of the "
            "expert that is best at the task. 1 is as good as that expert, 0 is nothing right."
        )
    return "The number is the accuracy: the part of the items that are answered right, 0 to 1."


def _sample(sample: SampleItem) -> dict[str, Any]:
    """A sample as the page shows it: texts are of models, and may be anything."""
    return {
        "title": f"{sample.task}: {_cut(sample.question)}",
        "answers": [
            (name, _cut(text), {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}"))
            for name, (text, score) in sample.answers.items()
        ],
    }


def _cut(text: str) -> str:
    short = " ".join(text[: 4 * _LONGEST].split())
    return clean(short if len(short) <= _LONGEST else short[:_LONGEST] + "…") or "(nothing)"


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


def _bars(shown: list[Line], relative: bool) -> Drawing:
    what = "accuracy relative to the expert" if relative else "accuracy"

    def draw(ax: Axes) -> None:
        for y, line in enumerate(reversed(shown)):
            assert line.mean is not None
            ax.barh(y, line.mean.value, color=COLOURS[line.row.role], height=0.7)
            ax.plot([line.mean.low, line.mean.high], [y, y], color=INK, lw=1.2)
        ax.set_yticks(range(len(shown)), [line.row.name for line in reversed(shown)])
        ax.set_xlim(left=0)
        ax.set_xlabel(f"{what}; lines: 95% intervals")
        roles = {line.row.role for line in shown}
        legend_above(ax, [Patch(color=COLOURS[r], label=_ROLES[r]) for r in _ROLES if r in roles])

    names = ", ".join(f"{x.row.name} {x.mean.value:.2f}" for x in shown if x.mean)
    size = (5.6, 0.24 * len(shown) + 1.4)
    title = f"{what.capitalize()}, mean over tasks"
    return drawing(title, f"Bars of {what}: {names}", draw, "bars", size)


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
            face = colour if line.difference.verdict != "unclear" else PAPER
            ax.plot(d.value, y, "o", color=colour, markerfacecolor=face, ms=5)
        ax.axvline(0, color=INK, lw=0.8)
        ax.set_yticks(range(len(compared)), [line.row.name for line in reversed(compared)])
        ax.set_ylim(-0.7, len(compared) - 0.3)
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlabel(f"difference from {reference}; left: worse".replace("$", r"\$"))
        dot = partial(Line2D, [], [], color=COLOURS["peer"], marker="o", linestyle="none")
        clear, unclear = dot(label="clear"), dot(label="not clear", markerfacecolor=PAPER)
        legend_above(ax, [clear, unclear])

    size = (5.6, 0.24 * len(compared) + 1.4)
    alt = "Paired differences with 95% intervals; a filled point's interval excludes zero"
    return drawing(f"Paired differences from {reference}", alt, draw, "differences", size)


def _best(points: Sequence[tuple[float, float]], bound: float | None) -> float:
    """The best mean within a bound on perplexity, where any setting is."""
    within = [value for cost, value in points if bound is None or cost <= bound]
    return max(within, default=max(value for _, value in points) - 1)  # after all that are


def _trials(shown: list[Line], comparison: Comparison) -> Drawing | None:
    """Every setting of every tuned method: what it keeps of the skills and of plain text.

    The best peers are told apart, as many as there are marks; the others look alike.
    """
    found = []
    for line in shown:
        points = [(t.perplexity, t.value) for t in line.row.trials if t.perplexity is not None]
        if points:
            found.append((line.row.role, line.row.name.replace("$", r"\$"), points))
    if not found:
        return None
    bound = comparison.bound
    peers = sorted((e for e in found if e[0] == "peer"), key=lambda e: -_best(e[2], bound))
    others = [point for *_, points in peers[len(_MARKS) :] for point in points]

    def draw(ax: Axes) -> None:
        drawn = partial(ax.plot, linestyle="none", ms=4, alpha=0.8)
        if others:
            drawn(*zip(*others, strict=True), marker=".", color=COLOURS["base"], label="others")
        for (_, name, points), (marker, colour) in zip(peers, _MARKS.items(), strict=False):
            drawn(*zip(*points, strict=True), marker=marker, color=colour, label=name)
        for role, name, points in found:
            if role == "ours":
                drawn(*zip(*points, strict=True), marker="o", color=COLOURS["ours"], label=name)
        if bound is not None:
            ax.axvline(bound, color=INK, lw=0.8, ls="--", label="equal perplexity")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(bottom=0)
        ax.set_xlabel("perplexity of plain text, times the base's; left: better")
        ax.set_ylabel("mean over tasks, validation items")
        legend_above(ax)

    count = sum(len(points) for *_, points in found)
    alt = f"{count} settings by what they keep of plain text and of the tasks"
    return drawing("Every setting that was tried", alt, draw, "trials", (5.6, 3.8))
