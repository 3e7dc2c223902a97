"""Which expert leads how many components, as a picture."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from mergekit_wp.card.contributions import Contributions
from mergekit_wp.report.figures import settings
from mergekit_wp.report.words import KIND_WORDS

# Okabe and Ito's colours, told apart by the colour-blind
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_REST = "#DDDDDD"


def chart(found: Contributions, names: tuple[str, ...]) -> bytes:
    """A PNG of one bar a kind: the share of components that each expert leads; grey, the base."""
    kinds = list(found.kinds)
    with settings():
        figure = Figure(figsize=(6.4, 0.8 + 0.42 * len(kinds)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(kinds))
        for i, name in enumerate(names):
            tallies = [found.kinds[kind] for kind in kinds]
            parts = np.array([tally.leading[i] / tally.total for tally in tallies])
            colour = _COLOURS[i % len(_COLOURS)]
            axes.barh(range(len(kinds)), parts, 0.7, left=left, color=colour, label=name)
            left += parts
        axes.barh(range(len(kinds)), 1 - left, 0.7, left=left, color=_REST, label="base")
        axes.set_yticks(range(len(kinds)))
        axes.set_yticklabels([f"{found.kinds[k].total:,} {KIND_WORDS[k]}" for k in kinds])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
