"""Pictures of a gates file: a PNG, and a page that opens offline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from mergekit_wp.files.gatesfile import GatesFile, as_scores
from mergekit_wp.report import figures, words
from mergekit_wp.report.gates import facts, portrait
from mergekit_wp.report.html import filled

# told apart by the colour-blind (Okabe and Ito)
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_history(file: GatesFile, ax: Axes) -> None:
    """Recovery of every behaviour by step: held-out with marks, fitted as a thin line."""
    history = file.manifest.history
    names = [e.behavior for e in file.manifest.experts] + [g.behavior for g in file.manifest.guards]
    looked = any(moment.held_out for moment in history)
    for i, name in enumerate(names):
        colour, label = _CYCLE[i % len(_CYCLE)], words.clean(name)
        fitted = [(m.step, m.fitted[name]) for m in history if m.fitted]
        held_out = [(m.step, m.held_out[name]) for m in history if m.held_out]
        if fitted:
            x, y = zip(*fitted, strict=True)
            ax.plot(x, y, color=colour, lw=0.7, label=None if looked else label)
        if held_out:
            x, y = zip(*held_out, strict=True)
            ax.plot(x, y, color=colour, lw=1.5, marker="o", ms=3, label=label)
    ax.axvline(file.manifest.best_step, color="#888888", lw=0.6, ls=":")
    ax.set_xlabel("step")
    ax.set_ylabel("recovery")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def draw_spread(file: GatesFile, ax: Axes) -> None:
    """How many gates have which value, expert by expert."""
    edges = np.linspace(0, file.manifest.upper, 31).tolist()
    for e, expert in enumerate(file.manifest.experts):
        every = np.concatenate([gates.numpy().ravel() for gates in file.gates(e).values()])
        colour = _CYCLE[e % len(_CYCLE)]
        ax.hist(
            every, edges, histtype="step", color=colour, label=words.clean(expert.behavior), lw=1.3
        )
    ax.set_yscale("log")
    ax.set_xlabel("gate")
    ax.set_ylabel("components")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def png(file: GatesFile) -> bytes:
    """One figure, a row of panels for each expert."""
    rows = []
    for e, expert in enumerate(file.manifest.experts):
        panels = figures.panel_list(as_scores(file, e), "path", "kl")
        rows.append((f"gates of {words.clean(expert.model.reference)}", panels))
    title = f"Gates of {words.count(len(rows), 'expert')}"
    return figures.grid(title, rows, file.manifest.n_layers)


@dataclass(frozen=True)
class _Expert:
    name: str
    said: list[str]
    drawn: list[tuple[str, str, Markup]]


def html(file: GatesFile) -> str:
    """One self-contained page."""
    experts = []
    for e, expert in enumerate(file.manifest.experts):
        drawn = [
            (panel.title, panel.alt, Markup(figures.svg(panel, f"e{e}-{panel.kind}", n)))
            for n in (file.manifest.n_layers,)
            for panel in figures.panel_list(as_scores(file, e), "path", "kl")
        ]
        experts.append(_Expert(words.clean(expert.model.reference), portrait(file, e), drawn))
    pictures = [
        (
            title,
            alt,
            Markup(figures.page_svg(partial(draw, file), prefix, (3.8, 3.0))),
        )
        for title, alt, draw, prefix in (
            ("Objective", "Recovery by step", draw_history, "history"),
            ("Gates", "Histogram of all gates", draw_spread, "spread"),
        )
    ]
    return filled("gates.html", facts=facts(file), pictures=pictures, experts=experts)
