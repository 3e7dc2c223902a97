"""What `stability`, `anchor` and `trace` find, as sentences and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from mergekit_wp.files.circuitfile import Measured, TraceFile
from mergekit_wp.files.manifest import Agreement
from mergekit_wp.report import words
from mergekit_wp.terms import ROLES, Role

if TYPE_CHECKING:
    from mergekit_wp.mechanism.anchors import LayerAnchor

_AGAINST = {
    "halves": "halves of the prompts",
    "run": "another run",
    "behavior": "another behaviour",
    "expert": "another expert",
}
_MEANING: dict[Role, str] = {
    "carrier": "holds the change in its weights and supplies others",
    "router": "has its effect from its suppliers",
    "executor": "acts on the output itself",
}
#: heads of tables; recoveries have their standard errors
AGREEMENT = ("against", "scores", "kind", "rank correlation", "overlap of leaders")
NODES = ("component", "role", "by weights", "by activations", "direct", "suppliers")
EDGES = ("from", "to", "by", "supply", "of its effect")
#: edges that a printed table lists
_SHOWN_EDGES = 20


def agreement_label(found: Agreement) -> str:
    """What the ranking is compared with."""
    name = f": {words.clean(found.name)}" if found.name else ""
    return _AGAINST[found.against] + name


def agreement_cells(found: Agreement) -> tuple[str, str]:
    """Rank correlation with its interval, and the overlap of the leaders."""
    overlap = f"{found.jaccard:.2f} of the top {found.top:,}"
    if found.needed is not None:
        overlap += f" (stable by about {found.needed:,} prompts)"
    return f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]", overlap


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


def agreement_rows(found: Iterable[Agreement]) -> list[tuple[str, ...]]:
    """One row per comparison and kind, below `AGREEMENT`."""
    return [
        (
            agreement_label(one),
            f"{one.estimand}/{one.criterion}",
            words.KIND_WORDS[one.kind],
            *agreement_cells(one),
        )
        for one in found
    ]


def agreement_table(found: list[Agreement]) -> str:
    """One line per comparison and kind."""
    if not found:
        return "nothing to compare: no scores vary, or too few prompts for halves; give other files"
    return words.columns(AGREEMENT, agreement_rows(found))


def anchor_table(found: list[LayerAnchor]) -> str:
    """How usable an anchor each layer has: one line a layer."""
    rows = [
        (
            str(layer.layer),
            f"{layer.separation:.2f}",
            words.interval(layer.stability),
            words.interval(layer.steering),
            "yes" if layer.usable else "-",
        )
        for layer in found
    ]
    return words.columns(("layer", "separation", "stability", "steering (kl)", "usable"), rows)


def circuit_sentences(trace: TraceFile) -> list[str]:
    """The circuit in words."""
    rules, strong = trace.rules, trace.strong
    said = [
        f"traced by {trace.criterion} on {words.count(trace.n_prompts, 'prompt')}: "
        f"{words.count(sum(n.target for n in trace.nodes), 'target')}, "
        f"{words.count(len(strong), 'edge')}; "
        f"an edge brings at least {rules.edge:.0%} of its target's effect"
    ]
    for role in ROLES:
        names = [node.name for node in trace.nodes if node.role == role]
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            listed = ", ".join(names[:6]) + more
            said.append(f"{words.count(len(names), role)} ({_MEANING[role]}): {listed}")
    spread = [n.suppliers_for_half for n in trace.nodes if n.suppliers_for_half is not None]
    if spread:
        said.append(
            f"half of what weights supply to a target comes from {min(spread):,} to "
            f"{max(spread):,} components, to first order"
        )
    said.append(f"supplies were screened {words.fidelity_words(trace.screen)}")
    return said


def node_rows(trace: TraceFile) -> list[tuple[str, ...]]:
    """Components below `NODES`, largest effect first."""
    arriving = {node.name: set[str]() for node in trace.nodes}
    for edge in trace.strong:
        arriving[edge.target].add(edge.source)
    return [
        (
            node.name,
            node.role or "–",
            *map(_measured, (node.gain, node.activation, node.direct)),
            str(len(arriving[node.name])) if node.target else "–",
        )
        for node in sorted(trace.nodes, key=lambda node: -node.activation.value)
    ]


def edge_rows(trace: TraceFile, most: int) -> list[tuple[str, ...]]:
    """The strongest edges, below `EDGES`."""
    effect = {node.name: node.activation.value for node in trace.nodes}
    return [
        (e.source, e.target, e.via, _measured(e.supply), f"{e.supply.value / effect[e.target]:.0%}")
        for e in trace.strong[:most]
    ]


def circuit_table(found: TraceFile) -> str:
    """What a circuit is: sentences, components with their roles, and the strongest edges."""
    parts = ["\n".join(circuit_sentences(found)), words.columns(NODES, node_rows(found))]
    if found.strong:
        parts.append(words.columns(EDGES, edge_rows(found, _SHOWN_EDGES)))
    return "\n\n".join(parts)


def _measured(measured: Measured) -> str:
    se = "" if measured.se is None else f" ± {measured.se:.3f}"
    return f"{measured.value:+.3f}{se}"
