"""Figures of a score file: one PNG with everything, or a panel at a time for a page."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import panels, words
from mergekit_wp.report.ranking import select
from mergekit_wp.statistics import Array
from mergekit_wp.terms import CriterionName, Estimand, Kind

#: Left to right; a reader meets the whole before the parts.
ORDER: tuple[Kind, ...] = ("layer", "tensor", "head", "kv_group", "neuron")
_MOST_PIXELS = 16_000
#: stands for the page's text colour in an inline SVG
INK = "#010203"
#: and for its background
PAPER = "#fdfeff"


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's defaults, whatever the user's matplotlibrc says; glyphs may be missing."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 10,
                "svg.fonttype": "none",
                "svg.hashsalt": "mergekit-wp",
                "axes.linewidth": 0.6,
            }
        )
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def panel_list(
    score_file: ScoreFile, estimand: Estimand, criterion: CriterionName
) -> list[panels.Panel]:
    """The panels of one estimand and criterion: one for each kind the file has."""
    manifest = score_file.manifest
    scale = colour_scale(score_file, estimand, criterion)
    found = []
    for kind in ORDER:
        if kind not in manifest.kinds or 0 in manifest.shape(kind):
            continue
        key = f"{estimand}/{criterion}/{kind}"
        se = score_file.tensors.get(f"{key}.se")
        errors = None if se is None else se.numpy().astype(np.float64)
        found.append(panels.make(manifest, kind, _values(score_file, key), errors, scale))
    return found


def colour_scale(
    score_file: ScoreFile, estimand: Estimand, criterion: CriterionName
) -> panels.ColourScale:
    """One scale for all scores of a file; another one for gates, which have a bound."""
    manifest = score_file.manifest
    if estimand == "path":
        return panels.ColourScale("gate", 0.0, manifest.path_bound("tensor"), gates=True)
    every = []
    for e, c in select(score_file).pairs:
        for kind in manifest.kinds if e != "path" else ():
            scores = _values(score_file, f"{e}/{c}/{kind}")
            if kind == "tensor":
                every.append(panels.tensor_grid(manifest, scores)[0])
            elif kind in ("head", "kv_group"):
                every.append(scores)
    return panels.ColourScale.of_scores(f"{estimand}/{criterion}", every)


def _values(score_file: ScoreFile, key: str) -> Array:
    return score_file.tensors[key].numpy().astype(np.float64)


def png(score_file: ScoreFile) -> bytes:
    """One figure, a row of panels for each estimand and criterion."""
    rows = [
        (_row_title(score_file, e, c), panel_list(score_file, e, c))
        for e, c in select(score_file).pairs
    ]
    return grid(_title(score_file), rows, score_file.manifest.n_layers)


def grid(title: str, rows: Sequence[tuple[str, list[panels.Panel]]], n_layers: int) -> bytes:
    """A PNG with titled rows of panels."""
    height = min(max(0.075 * n_layers, 1.6), 6.0) + 1.9
    width = max(sum(p.width + 0.75 for p in row) for _, row in rows) + 0.4
    size = (max(width, 5.0), height * len(rows) + 0.8)
    with settings():
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(
            _wrap(title, size[0] * 9.5), fontsize=12, x=0.01, ha="left", parse_math=False
        )
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, (heading, row) in zip(parts, rows, strict=True):
            part.suptitle(_wrap(heading, size[0] * 11.5), fontsize=10, x=0.01, ha="left")
            _row(part, row)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=min(150.0, _MOST_PIXELS / max(size)))
    return buffer.getvalue()


def _wrap(text: str, width: float) -> str:
    """Break lines to a number of characters; give up after three of them."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, int(width))[:3]]
    return "\n".join(lines)


def _title(score_file: ScoreFile) -> str:
    manifest = score_file.manifest
    expert = words.clean(manifest.expert.reference)
    base = words.clean(manifest.base.reference)
    return f"{words.clean(manifest.behavior)}\n{expert} against {base}"


def _row_title(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> str:
    if estimand == "share":
        return f"share/{criterion}: {words.share_words(score_file, criterion)}"
    spread = words.portrait(score_file, estimand, criterion).spread
    return f"{estimand}/{criterion}: {spread}"


def _row(part: SubFigure, row: list[panels.Panel]) -> None:
    grid = part.subplots(
        1, len(row), squeeze=False, sharey=True, width_ratios=[panel.width for panel in row]
    )
    for place, (ax, panel) in enumerate(zip(grid[0], row, strict=True)):
        ax.set_title(panel.title)
        draw_panel(panel, ax)
        if place > 0:
            ax.set_ylabel("")


def draw_panel(panel: panels.Panel, ax: Axes) -> None:
    """One panel, with a bar that explains its colours."""
    ax.set_ylabel("layer")
    drawn = panel.draw(ax)
    if drawn is None:
        return
    image, scale = drawn
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, location="bottom", aspect=14, fraction=0.06, pad=0.02)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(length=2, labelsize="small")
    bar.minorticks_off()
    if scale is None:
        bar.set_label("neurons")
        powers = [10.0**power for power in range(int(np.log10(image.get_clim()[1])) + 1)]
        bar.set_ticks(powers, labels=[f"{tick:,.0f}" for tick in powers])
    else:
        bar.set_label(scale.unit)
        bar.set_ticks(scale.ticks, labels=[panels.signed(t) for t in scale.ticks])


def legend_above(ax: Axes, handles: Sequence[Artist] | None = None) -> None:
    """A legend over the axes, as wide as the figure, where it covers nothing."""
    own = ax.get_legend_handles_labels()[0] if handles is None else list(handles)
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(handles=own, frameon=False, loc="outside upper center", ncols=min(len(own), 3))


@dataclass(frozen=True)
class Drawing:
    """A figure for a page.

    Attributes:
        title: its caption.
        alt: the text that stands for it.
        svg: an ``<svg>`` element in the page's text colour, without any address.
    """

    title: str
    alt: str
    svg: Markup


def drawing(
    title: str, alt: str, draw: Callable[[Axes], None], prefix: str, size: tuple[float, float]
) -> Drawing:
    """Draw a figure for a page.

    Args:
        title: its caption.
        alt: the text that stands for it.
        draw: draws it.
        prefix: how the ids in it begin, so that those of a page differ.
        size: in inches.
    """
    ink = matplotlib.rc_context(
        {
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
        }
    )
    with settings(), ink:
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        ax = figure.add_subplot()
        ax.patch.set_visible(False)
        draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None})
    # nothing in it comes from a file but numbers, and text that matplotlib has escaped
    return Drawing(title, alt, Markup(_inline(buffer.getvalue(), prefix)))


def _inline(text: str, prefix: str) -> str:
    """Matplotlib's SVG document as an element of an HTML page."""
    element = text[text.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'\s(width|height)="[\d.]+pt"', "", element, count=2)
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", element)
    return element.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
