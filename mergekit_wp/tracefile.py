"""The trace file: JSON with the nodes, edges and roles that `mergekit-wp trace` found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from mergekit_wp.errors import UserError
from mergekit_wp.files import written_whole
from mergekit_wp.roles import Edge, Node, Rules
from mergekit_wp.scorefile import CriterionName, ScoreFile
from mergekit_wp.untrusted import complaint, parse_json


class Screen(BaseModel):
    """How well the first-order screen predicts exact supplies, over leading and random pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    leading: int
    random: int
    pearson: float | None
    spearman: float | None
    pearson_random: float | None
    #: largest exact |supply| among the random pairs that are not leading ones
    largest_missed: float | None


class TraceFile(BaseModel):
    """What `mergekit-wp trace` writes; ``scores_sha256`` says for which score file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
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
    screen: Screen
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    seed: int
    #: arguments of `mergekit-wp` but for ``--out``, and versions, see `scoring.command`
    command: tuple[str, ...]
    versions: dict[str, str]

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
        temporary.write_text(trace.model_dump_json(indent=1) + "\n")


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
