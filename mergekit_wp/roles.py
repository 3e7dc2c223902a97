"""Roles of components in a circuit, by rules that stand here and can be adjusted. Pure maths.

The picture of "Weight Patching" (arXiv 2604.13694): shallow components carry in their weights what
the expert learned, components in the middle gather and route it, late ones turn it into output.
The thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_wp.components import FineKind

Role = Literal["carrier", "router", "executor"]
Via = Literal["weights", "activations"]
ROLES: tuple[Role, ...] = ("carrier", "router", "executor")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rules(_Strict):
    """When a supply is an edge, and when a component has a role.

    A component's *effect* is what it does when it writes what it writes in the expert's run. To
    have a role it must be above zero by two standard errors and at least ``least`` of the
    circuit's largest. The first rule that fits gives the role.

    - an *edge* is a supply above two standard errors and at least ``edge`` of its target's effect
    - *carrier*: its weights alone have at least ``own`` of its effect, it lies in the first
      ``shallow`` part of the layers, and an edge by its weights leaves it
    - *executor*: at least ``direct`` of its effect reaches the output without later components
    - *router*: its weights alone have less than ``own`` of its effect, and edges from
      ``suppliers`` or more components lead to it
    """

    least: float = Field(default=0.05, gt=0, le=1)
    edge: float = Field(default=0.05, gt=0, le=1)
    own: float = Field(default=0.5, gt=0, le=1)
    shallow: float = Field(default=0.5, ge=0, le=1)
    direct: float = Field(default=0.5, gt=0, le=1)
    suppliers: int = Field(default=1, ge=1)


class Measured(_Strict):
    """A recovery of the criterion with its standard error, None with one prompt."""

    value: float
    se: float | None

    @property
    def clear(self) -> bool:
        """Above zero by more than two standard errors."""
        return self.value > 2 * (self.se or 0.0)


class Node(_Strict):
    """One component of the traced circuit, measured by exact patches into the base.

    Attributes:
        kind, layer, index, name: which component.
        target: whether its suppliers were looked for.
        gain: what its weights alone do.
        activation: what it does when it writes what it writes in the expert's run.
        direct: the part of that which reaches the output without later components.
        suppliers_for_half: of a target: how many components make up half of all that is supplied
            to it by weights, to first order.
        accounted: of a target: what its own weights and all that other components write supply,
            to first order, over its effect.
        role: by the rules; None where none fits.
    """

    kind: FineKind
    layer: int
    index: int
    name: str
    target: bool
    gain: Measured
    activation: Measured
    direct: Measured
    suppliers_for_half: int | None = None
    accounted: float | None = None
    role: Role | None = None


class Edge(_Strict):
    """What one component supplies to another along the residual stream alone.

    ``via`` weights: the source has the expert's weights and the base's input; activations: it
    writes what it writes in the expert's run. ``screened`` is the first-order estimate; ``strong``
    says whether the supply counts as an edge by the rules.
    """

    source: str
    target: str
    via: Via
    supply: Measured
    screened: float
    strong: bool


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
