"""A traced circuit as a layered graph: layers upward, edges from suppliers to targets."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mergekit_wp.files.circuitfile import Edge, Node, TraceFile
from mergekit_wp.report.figures import PAPER, legend_above
from mergekit_wp.terms import ROLES, Role, Via

#: strongest edges that are drawn; a graph of more is not read
MOST_EDGES = 40
# told apart by the colour-blind, and by their marks in grey (Okabe and Ito)
_STYLE: dict[Role | None, tuple[str, str, str]] = {
    "carrier": ("#D55E00", "s", "■ "),
    "router": ("#0072B2", "o", "● "),
    "executor": ("#009E73", "^", "▲ "),
    None: ("#888888", ".", ""),
}
_LINES: dict[Via, Literal["-", "--"]] = {"weights": "-", "activations": "--"}


def drawn_edges(trace: TraceFile) -> list[Edge]:
    """The strongest edges; of two along the same way, by weights and activations, both."""
    return list(trace.strong[:MOST_EDGES])


def positions(trace: TraceFile) -> dict[str, tuple[float, float]]:
    """Where components stand: rows of layers upward, each near the middle of its neighbours."""
    edges = drawn_edges(trace)
    named = {e.source for e in edges} | {e.target for e in edges}
    nodes = [n for n in trace.nodes if n.name in named or n.target]
    layers = sorted({node.layer for node in nodes})
    rows = {layer: [n for n in nodes if n.layer == layer] for layer in layers}
    x = {n.name: i - (len(row) - 1) / 2 for row in rows.values() for i, n in enumerate(row)}
    for _ in range(4):  # barycentre sweeps, as in Sugiyama's method
        for row in rows.values():
            centre = {n.name: _centre(n.name, edges, x) for n in row}
            row.sort(key=lambda n: (centre[n.name], n.name))
            x |= {n.name: i - (len(row) - 1) / 2 for i, n in enumerate(row)}
    widest = max((len(row) for row in rows.values()), default=1)
    spread = {layer: widest / (len(row) + 1) for layer, row in rows.items()}
    return {
        n.name: (x[n.name] * spread[layer], float(layers.index(layer)))
        for layer, row in rows.items()
        for n in row
    }


def _centre(name: str, edges: list[Edge], x: dict[str, float]) -> float:
    near = [x[e.source] for e in edges if e.target == name]
    near += [x[e.target] for e in edges if e.source == name]
    return float(np.mean(near)) if near else x[name]


def size(trace: TraceFile) -> tuple[float, float]:
    """Width and height of the drawing in inches."""
    rows = Counter(y for _, y in positions(trace).values())
    width = min(max(0.75 * max(rows.values(), default=1), 4.2), 9.0)
    return (width, min(max(0.75 * len(rows) + 1.2, 2.6), 14.0))


def draw(trace: TraceFile, ax: Axes) -> None:
    """The graph. Width of a line: the part of the target's effect that comes along it.

    Components are framed labels, and arrows end at the frames, so that no head lies on a label.
    """
    at = positions(trace)
    nodes = {node.name: node for node in trace.nodes}
    frames = {name: _label(ax, nodes[name], place) for name, place in at.items()}
    for edge in reversed(drawn_edges(trace)):
        part = edge.supply.value / nodes[edge.target].activation.value
        bend = 0.12 if edge.via == "weights" else -0.12
        ax.annotate(
            "",
            xy=at[edge.target],
            xytext=at[edge.source],
            arrowprops={
                "arrowstyle": "-|>",
                "connectionstyle": f"arc3,rad={bend}",
                "linestyle": _LINES[edge.via],
                "linewidth": 0.5 + 2.5 * min(max(part, 0.0), 1.0),
                "color": "#888888",
                "patchA": frames[edge.source],
                "patchB": frames[edge.target],
                "shrinkA": 1,
                "shrinkB": 2,
            },
            zorder=2,
        )
    layers = sorted({nodes[name].layer for name in at})
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_ylabel("layer")
    ax.set_xticks([])
    # labels alone do not make room
    ax.plot([x for x, _ in at.values()], [y for _, y in at.values()], linestyle="none")
    ax.margins(0.18, 0.12)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    present = [r for r in (*ROLES, None) if any(nodes[name].role == r for name in at)]
    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle="none", label=role or "no role")
        for role in present
        for colour, mark, _ in [_STYLE[role]]
    ]
    handles += [
        Line2D([], [], color="#888888", linestyle=style, label=f"by {via}")
        for via, style in _LINES.items()
        if any(edge.via == via for edge in drawn_edges(trace))
    ]
    legend_above(ax, handles)


def _label(ax: Axes, node: Node, place: tuple[float, float]) -> Patch:
    """A component's name in the frame of its role; above other components' arrows."""
    colour, _, mark = _STYLE[node.role]
    text = ax.text(
        *place,
        f"{mark}{node.kind.replace('_', ' ')} {node.index}",
        ha="center",
        va="center",
        fontsize=7,
        zorder=3,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": PAPER, "edgecolor": colour},
    )
    patch = text.get_bbox_patch()
    assert patch is not None
    return patch
