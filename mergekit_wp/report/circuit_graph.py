"""A traced circuit as a layered graph: layers upward, edges from suppliers to targets."""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mergekit_wp.files.circuitfile import Edge, TraceFile
from mergekit_wp.terms import ROLES, Via

#: strongest edges that are drawn; a graph of more is not read
MOST_EDGES = 40
# told apart by the colour-blind, and by their marks in grey (Okabe and Ito)
_STYLE = {
    "carrier": ("#D55E00", "s"),
    "router": ("#0072B2", "o"),
    "executor": ("#009E73", "^"),
    None: ("#888888", "."),
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
    rows = len({y for _, y in positions(trace).values()})
    return (4.2, min(max(0.55 * rows + 1.2, 2.6), 14.0))


def draw(trace: TraceFile, ax: Axes) -> None:
    """The graph. Width of a line: the part of the target's effect that comes along it."""
    at = positions(trace)
    nodes = {node.name: node for node in trace.nodes}
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
                "shrinkA": 4,
                "shrinkB": 5,
            },
        )
    for name, (x, y) in at.items():
        colour, mark = _STYLE[nodes[name].role]
        ax.plot([x], [y], marker=mark, color=colour, markersize=7, linestyle="none")
        label = f"{nodes[name].kind.replace('_', ' ')} {nodes[name].index}"
        ax.annotate(label, (x, y), (0, -9), textcoords="offset points", ha="center", fontsize=6)
    layers = sorted({nodes[name].layer for name in at})
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_ylabel("layer")
    ax.set_xticks([])
    ax.margins(0.12, 0.08)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    present = [r for r in (*ROLES, None) if any(nodes[name].role == r for name in at)]
    handles = [
        Line2D([], [], color=_STYLE[r][0], marker=_STYLE[r][1], linestyle="none", label=r or "none")
        for r in present
    ]
    handles += [
        Line2D([], [], color="#888888", linestyle=style, label=f"by {via}")
        for via, style in _LINES.items()
        if any(edge.via == via for edge in drawn_edges(trace))
    ]
    ax.legend(handles=handles, frameon=False, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
