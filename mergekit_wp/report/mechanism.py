"""What `stability`, `anchor` and `trace` find, as sentences and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from mergekit_wp.files.circuitfile import Edge, Measured, Node, TraceFile
from mergekit_wp.files.manifest import Agreement
from mergekit_wp.report import words

if TYPE_CHECKING:
    from mergekit_wp.mechanism.anchors import LayerAnchor

_AGAINST = {
    "halves": "halves of the prompts",
    "run": "another run",
    "behavior": "another behaviour",
    "expert": "another expert",
}
#: edges that a table lists
_SHOWN_EDGES = 20


def agreement_label(found: Agreement) -> str:
    """What the ranking is compared with."""
    name = f": {words.clean(found.name)}" if found.name else ""
    return _AGAINST[found.against] + name


def agreement_cells(found: Agreement) -> tuple[str, str]:
    """Rank correlation with its interval, and the overlap of the leaders."""
    return (
        f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]",
        f"{found.jaccard:.2f} of the top {found.top:,}",
    )


def agreement_groups(
    every: Iterable[Agreement], estimand: str, criterion: str
) -> Iterator[list[Agreement]]:
    """Comparisons of one estimand and criterion, kinds together."""
    wanted = [one for one in every if (one.estimand, one.criterion) == (estimand, criterion)]
    for _, group in groupby(wanted, key=agreement_label):
        yield list(group)


def agreement_sentence(group: Iterable[Agreement]) -> str:
    """One comparison, kinds side by side."""
    listed = list(group)
    parts = (
        f"{words.KIND_WORDS[f.kind]} {agreement_cells(f)[0]}, overlap {agreement_cells(f)[1]}"
        for f in listed
    )
    return f"{agreement_label(listed[0])}: {'; '.join(parts)}"


def agreement_table(found: list[Agreement]) -> str:
    """One line per comparison and kind."""
    if not found:
        return "nothing to compare: no scores vary, or too few prompts for halves; give other files"
    rows = [
        (
            agreement_label(a),
            f"{a.estimand}/{a.criterion}",
            words.KIND_WORDS[a.kind],
            *agreement_cells(a),
        )
        for a in found
    ]
    head = ("against", "scores", "kind", "rank correlation", "overlap")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def anchor_table(found: list[LayerAnchor]) -> str:
    """How usable an anchor each layer has: one line a layer."""
    output = [f"{'layer':>5}  {'separation':>10}  {'stability':<21}{'steering (kl)':<22}usable"]
    for layer in found:
        both = (layer.stability, layer.steering)
        cells = [f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for e in both]
        output.append(
            f"{layer.layer:>5}  {layer.separation:>10.2f}  {cells[0]:<21}{cells[1]:<22}"
            f"{'yes' if layer.usable else '-'}"
        )
    return "\n".join(output)


def circuit_table(found: TraceFile) -> str:
    """Components with their roles, and the strongest edges."""
    lines = [
        f"recovery of {found.criterion} over {found.n_prompts} prompts, ± standard error",
        "",
        f"{'component':<24}{'role':<10}{'by weights':<17}{'by activations':<17}{'direct':<17}"
        "supplied by",
    ]
    strong = found.strong
    for node in found.nodes:
        arriving = len({edge.source for edge in strong if edge.target == node.name})
        supplied = str(arriving) if node.target else "not traced"
        cells = "".join(f"{_measured(m):<17}" for m in (node.gain, node.activation, node.direct))
        lines.append(f"{node.name:<24}{node.role or '-':<10}{cells}{supplied}")
    lines += ["", f"{len(strong)} edges; the strongest:" if strong else "no edges"]
    lines += [_edge(edge, found.nodes) for edge in strong[:_SHOWN_EDGES]]
    screen = found.screen
    if screen.pearson is not None:
        lines += [
            "",
            f"first-order screen against {screen.leading + screen.random} exact supplies:",
        ]
        lines[-1] += f" Pearson {screen.pearson:.3f}"
        if screen.largest_missed is not None:
            lines[-1] += f", largest missed {screen.largest_missed:.2g}"
    return "\n".join(lines)


def _edge(edge: Edge, nodes: tuple[Node, ...]) -> str:
    effect = next(node.activation.value for node in nodes if node.name == edge.target)
    return (
        f"  {edge.source} -> {edge.target}, by {edge.via}: {_measured(edge.supply)} "
        f"({edge.supply.value / effect:.0%} of its effect)"
    )


def _measured(measured: Measured) -> str:
    se = "" if measured.se is None else f" ± {measured.se:.3f}"
    return f"{measured.value:+.3f}{se}"
