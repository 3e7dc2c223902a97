"""A traced circuit as a layered graph: layers upward, edges from suppliers to targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mergekit_wp.files.circuitfile import Edge, Measured, Node, TraceFile
from mergekit_wp.report.words import count
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
_MEANING = {
    "carrier": "holds the change in its weights and supplies others",
    "router": "has its effect from its suppliers",
    "executor": "acts on the output itself",
    None: "no role by the rules",
}


@dataclass(frozen=True)
class CircuitRow:
    """A component of the circuit as text."""

    name: str
    role: str
    gain: str
    activation: str
    direct: str
    suppliers: str


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


def sentences(trace: TraceFile) -> list[str]:
    """The circuit in words."""
    rules, strong = trace.rules, trace.strong
    said = [
        f"traced by {trace.criterion} on {count(trace.n_prompts, 'prompt')}: "
        f"{count(sum(n.target for n in trace.nodes), 'target')}, {count(len(strong), 'edge')}; "
        f"an edge brings at least {rules.edge:.0%} of its target's effect"
    ]
    for role in ROLES:
        names = [node.name for node in trace.nodes if node.role == role]
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            listed = ", ".join(names[:6]) + more
            said.append(f"{count(len(names), role)} ({_MEANING[role]}): {listed}")
    spread = [n.suppliers_for_half for n in trace.nodes if n.suppliers_for_half is not None]
    if spread:
        said.append(
            f"half of what weights supply to a target comes from {min(spread):,} to "
            f"{max(spread):,} components, to first order"
        )
    screen = trace.screen
    if screen.pearson is not None:
        said.append(
            f"the first-order screen against {screen.leading + screen.random:,} exact supplies: "
            f"Pearson {screen.pearson:.3f}"
        )
    return said


def node_rows(trace: TraceFile) -> list[CircuitRow]:
    """Components, largest effect first."""
    arriving = {node.name: set[str]() for node in trace.nodes}
    for edge in trace.strong:
        arriving[edge.target].add(edge.source)

    def row(node: Node) -> CircuitRow:
        return CircuitRow(
            name=node.name,
            role=node.role or "–",
            gain=_cell(node.gain),
            activation=_cell(node.activation),
            direct=_cell(node.direct),
            suppliers=str(len(arriving[node.name])) if node.target else "–",
        )

    return [row(n) for n in sorted(trace.nodes, key=lambda n: -n.activation.value)]


def edge_rows(trace: TraceFile) -> list[tuple[str, str, str, str]]:
    """Source, target, via and supply of the edges that are drawn."""
    return [(e.source, e.target, e.via, _cell(e.supply)) for e in drawn_edges(trace)]


def _cell(measured: Measured) -> str:
    return f"{measured.value:+.3f}"
