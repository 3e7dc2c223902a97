"""Roles of components in a circuit, by rules that stand here and can be adjusted. Pure maths.

The picture of "Weight Patching" (arXiv 2604.13694): shallow components carry in their weights what
the expert learned, components in the middle gather and route it, late ones turn it into output.
The thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_wp.files.circuitfile import Edge, Measured, Node, Rules
from mergekit_wp.terms import Role


def is_edge(supply: Measured, effect: Measured, rules: Rules) -> bool:
    """Whether a supply counts as an edge to a target of this effect."""
    return supply.clear and effect.clear and supply.value >= rules.edge * effect.value


def role(
    node: Node, edges: Sequence[Edge], largest: float, n_layers: int, rules: Rules
) -> Role | None:
    """The role of a component.

    Args:
        node: the component.
        edges: of the whole circuit.
        largest: effect in the circuit.
        n_layers: of the model.
        rules: the thresholds.
    """
    strong = [edge for edge in edges if edge.strong]
    effect = node.activation.value
    if not node.activation.clear or effect < rules.least * largest:
        return None
    encoded = node.gain.clear and node.gain.value >= rules.own * effect
    depth = node.layer / max(n_layers - 1, 1)
    leaving = [e for e in strong if e.source == node.name and e.via == "weights"]
    if encoded and depth < rules.shallow and leaving:
        return "carrier"
    if node.direct.clear and node.direct.value >= rules.direct * effect:
        return "executor"
    arriving = {edge.source for edge in strong if edge.target == node.name}
    if not encoded and len(arriving) >= rules.suppliers:
        return "router"
    return None
