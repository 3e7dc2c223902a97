"""The trace file: JSON with the nodes, edges and roles that `mergekit-wp trace` found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.manifest import Fidelity, Omitting
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.files.untrusted import StrictModel, complaint, parse_json
from mergekit_wp.options import Option
from mergekit_wp.terms import CriterionName, FineKind, Role, Via


class Rules(StrictModel):
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

    least: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="A component has a role from this part of the circuit's largest effect on.",
    )
    edge: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="A supply counts from this part of its target's effect on.",
    )
    own: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="A carrier's weights alone have at least this part of its effect, a router's "
        "less.",
    )
    shallow: float = Field(
        default=0.5, ge=0, le=1, description="Carriers lie in this first part of the layers."
    )
    direct: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="An executor has at least this part of its effect without later components.",
    )
    suppliers: Annotated[int, Option(flag="min-suppliers")] = Field(
        default=1, ge=1, description="Components that have to supply a router."
    )


class Measured(StrictModel):
    """A recovery of the criterion with its standard error, None with one prompt."""

    value: float
    se: float | None

    @property
    def clear(self) -> bool:
        """Above zero by more than two standard errors."""
        return self.value > 2 * (self.se or 0.0)


class Node(StrictModel):
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


class Edge(StrictModel):
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


class TraceFile(Omitting):
    """What `mergekit-wp trace` writes; ``scores_sha256`` says for which score file.

    ``screen`` says how well the first order predicts exact supplies, over the leading and the
    random pairs. ``template_date`` is the day that the chat template wrote, None where it read
    none.
    """

    omitted: ClassVar = ("template_date",)

    format_version: Literal[1] = 1
    behavior: str
    base: str
    expert: str
    scores_sha256: str
    prompts_sha256: str
    n_prompts: PositiveInt
    n_layers: PositiveInt
    criterion: CriterionName
    rules: Rules
    screen: Fidelity
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    seed: int
    #: arguments of `mergekit-wp` but for ``--out``, and versions, see `runs.command`
    command: tuple[str, ...]
    versions: dict[str, str]
    template_date: str | None = None

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        nodes = {node.name: node for node in self.nodes}
        if len(nodes) < len(self.nodes):
            raise ValueError("nodes: a name stands twice")
        for node in self.nodes:
            if not 0 <= node.layer < self.n_layers or node.index < 0:
                raise ValueError(f"node '{node.name}' is no component of the model")
        for edge in self.strong:
            for end in (edge.source, edge.target):
                if end not in nodes:
                    raise ValueError(f"an edge names '{end}', which is no node")
            if nodes[edge.target].activation.value <= 0:
                raise ValueError(f"'{edge.target}' has no effect, so nothing is an edge to it")
        return self

    @property
    def strong(self) -> tuple[Edge, ...]:
        """Supplies that count as edges, strongest first."""
        found = [edge for edge in self.edges if edge.strong]
        return tuple(sorted(found, key=lambda edge: -edge.supply.value))


def write(trace: TraceFile, path: Path) -> None:
    """Write the file under its name only when complete."""
    with written_whole(path) as temporary:
        temporary.write_text(trace.model_dump_json(indent=1) + "\n", encoding="utf-8")


def is_trace_file(path: str | os.PathLike[str]) -> bool:
    """Whether this looks like JSON, unlike a safetensors file (whose JSON stands at byte 8)."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[:1] == b"{" != start[8:]


def read(path: Path, scores: ScoreFile | None = None) -> TraceFile:
    """Read a trace file; one that belongs to `scores` where they are given.

    Raises:
        UserError: unreadable, no trace file, or of other scores; names the file.
    """
    try:
        trace = TraceFile.model_validate(parse_json(path.read_bytes()))
    except ValidationError as error:
        raise UserError(
            f"trace file {path}: {complaint(error)}; make one with "
            "'mergekit-wp trace FILE --prompts FILE.jsonl --out trace.json'"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"trace file {path} cannot be read: {error}") from error

    if scores is not None and trace.scores_sha256 != scores.digest():
        raise UserError(
            f"trace file {path} was made from other scores "
            f"('{trace.behavior}' of {trace.expert}); trace this score file anew"
        )
    return trace
