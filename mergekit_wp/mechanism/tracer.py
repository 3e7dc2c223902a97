"""Screen, measure and name the supplies of one circuit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from mergekit_wp.criteria import recovery
from mergekit_wp.engine.paths import Place
from mergekit_wp.files.circuitfile import Edge, Measured, Node
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.mechanism.roles import is_edge, role
from mergekit_wp.mechanism.supplies import (
    SUPPLIER_KINDS,
    Effect,
    Screen,
    Supplies,
    Supply,
    SupplyPair,
)
from mergekit_wp.runs.run import Jobs
from mergekit_wp.scoring.fidelity import verdict
from mergekit_wp.terms import FineKind, Via


class Tracer:
    """Screens, measures and names one circuit."""

    def __init__(self, request: TraceRequest, supplies: Supplies, jobs: Jobs) -> None:
        self.request, self.supplies, self.jobs = request, supplies, jobs
        self.recordings, self.targets = supplies.recordings, supplies.targets
        self.dims = self.recordings.partition.dims
        self.batches = self.recordings.references.batches
        self.distance = self.recordings.references.values[supplies.criterion].distance.double()

    def circuit(self) -> tuple[tuple[Node, ...], tuple[Edge, ...], Fidelity]:
        """Nodes with their roles, all leading supplies, and how good the screen was."""
        screened = self._screen()
        pairs = list(self._pairs(screened))
        supplies = self._supplies(pairs)
        effects = self._effects(list(self.targets))
        edges = tuple(
            Edge(
                source=pair.source.name,
                target=pair.target.name,
                via=pair.via,
                supply=supply,
                screened=pair.screened,
                strong=is_edge(supply, effects[pair.target][1], self.request.rules),
            )
            for pair, supply in zip(pairs, supplies, strict=True)
            if pair.leading
        )
        places = {pair.source.name: pair.source for pair in pairs}
        sources = {places[e.source] for e in edges if e.strong} - set(self.targets)
        effects |= self._effects(sorted(sources))
        largest = max(activation.value for _, activation, _ in effects.values())
        nodes = []
        for place in sorted(effects):
            gain, activation, direct = effects[place]
            node = Node(
                kind=place.kind,
                layer=place.layer,
                index=place.index,
                name=place.name,
                target=place in self.targets,
                gain=gain,
                activation=activation,
                direct=direct,
            )
            if node.target:
                node = node.model_copy(update=self._totals(node, place, screened))
            found = role(node, edges, largest, self.dims.n_layers, self.request.rules)
            nodes.append(node.model_copy(update={"role": found}))
        return tuple(nodes), edges, self._fidelity(pairs, supplies)

    def _measured(self, change: torch.Tensor) -> Measured:
        value, error = recovery(change, self.distance)
        known = bool(torch.isfinite(error))
        return Measured(value=float(value), se=float(error) if known else None)

    # --- first-order screen -------------------------------------------------------------------

    def _screen(self) -> dict[tuple[int, Via, FineKind], torch.Tensor]:
        """First-order supplies ``[layers, count]`` to each target, by via and kind."""
        depth = max(target.layer for target in self.targets) + 1
        parts = [Screen(b) for b in range(len(self.batches))]
        total: dict[str, torch.Tensor] = {}
        for _, found in self.jobs.finished(
            "screening suppliers", "layer", parts, self.supplies, lambda _: depth
        ):
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + value.double()
        scale = self.recordings.n_prompts * float(self.distance.mean())
        return {
            (t, via, kind): total[f"{t}/{via}/{kind}"] / scale
            for t in range(len(self.targets))
            for via, kinds in SUPPLIER_KINDS.items()
            for kind in kinds
        }

    # --- exact supplies -----------------------------------------------------------------------

    def _pairs(
        self, screened: Mapping[tuple[int, Via, FineKind], torch.Tensor]
    ) -> Iterator[SupplyPair]:
        """The leading suppliers of every target, and random ones to judge the screen by."""
        generator = torch.Generator().manual_seed(self.request.seed)
        count = self.request.suppliers
        for t, target in enumerate(self.targets):
            for via, kinds in SUPPLIER_KINDS.items():
                places = [
                    (Place(layer, kind, 0), kind)
                    for kind in kinds
                    for layer in range(target.layer + 1)
                    if self.supplies.reads(target, Place(layer, kind, 0))
                ]
                if not places:
                    continue
                flat = torch.cat([screened[t, via, kind][p.layer] for p, kind in places])
                widths = [self.dims.count(kind) for _, kind in places]
                starts = torch.tensor([0, *widths]).cumsum(0)
                order = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
                top = [i for i in order.tolist() if flat[i] != 0]
                nonzero = flat.nonzero().flatten()
                chosen = torch.randperm(len(nonzero), generator=generator)[:count]
                drawn = nonzero[chosen].tolist()
                for i in sorted({*top, *drawn}):
                    which = int(torch.searchsorted(starts, i, right=True)) - 1
                    place, kind = places[which]
                    source = Place(place.layer, kind, i - int(starts[which]))
                    yield SupplyPair(
                        target, via, source, float(flat[i]), leading=i in top, drawn=i in drawn
                    )

    def _supplies(self, pairs: Sequence[SupplyPair]) -> list[Measured]:
        """Exact supply of every pair."""
        changes = torch.zeros((len(pairs), self.recordings.n_prompts), dtype=torch.float64)
        by_layer: dict[int, list[int]] = {}
        for p, pair in enumerate(pairs):
            by_layer.setdefault(pair.source.layer, []).append(p)
        parts = [
            Supply(b, layer, tuple(pairs[p] for p in members))
            for b in range(len(self.batches))
            for layer, members in sorted(by_layer.items())
        ]
        for part, found in self.jobs.finished(
            "measuring supplies", "path", parts, self.supplies, lambda part: len(part.pairs)
        ):
            rows = torch.tensor(by_layer[part.layer]).unsqueeze(-1)
            changes[rows, self.batches[part.batch].members] = found["changes"].double()
        return [self._measured(change) for change in changes]

    # --- nodes --------------------------------------------------------------------------------

    def _effects(self, places: Sequence[Place]) -> dict[Place, tuple[Measured, Measured, Measured]]:
        """Exact gain, effect by activations and its direct part of every component."""
        if not places:
            return {}
        changes = torch.zeros((len(places), 3, self.recordings.n_prompts), dtype=torch.float64)
        parts = [Effect(b, place) for b in range(len(self.batches)) for place in places]
        rows = {place: row for row, place in enumerate(places)}
        for part, found in self.jobs.finished(
            "measuring components", "component", parts, self.supplies
        ):
            members = self.batches[part.batch].members
            changes[rows[part.place]][:, members] = found["changes"].double()
        return {
            place: (self._measured(of[0]), self._measured(of[1]), self._measured(of[2]))
            for place, of in zip(places, changes, strict=True)
        }

    def _totals(
        self,
        node: Node,
        target: Place,
        screened: Mapping[tuple[int, Via, FineKind], torch.Tensor],
    ) -> dict[str, float | int | None]:
        """How spread the supply is, and how much of the target's effect it accounts for."""
        t = self.targets.index(target)
        by_weights = torch.cat(
            [screened[t, "weights", kind].flatten() for kind in SUPPLIER_KINDS["weights"]]
        )
        mass = by_weights[by_weights > 0].sort(descending=True).values.cumsum(0)
        half = int(torch.searchsorted(mass, mass[-1] / 2)) + 1 if len(mass) else None
        written = sum(
            float(screened[t, "activations", kind].sum()) for kind in SUPPLIER_KINDS["activations"]
        )
        effect = node.activation.value
        accounted = (node.gain.value + written) / effect if effect else None
        return {"suppliers_for_half": half, "accounted": accounted}

    def _fidelity(self, pairs: Sequence[SupplyPair], supplies: Sequence[Measured]) -> Fidelity:
        predicted = torch.tensor([pair.screened for pair in pairs], dtype=torch.float64)
        exact = torch.tensor([supply.value for supply in supplies], dtype=torch.float64)
        top = [p for p, pair in enumerate(pairs) if pair.leading]
        drawn = [p for p, pair in enumerate(pairs) if pair.drawn]
        return verdict(predicted, exact, top, drawn, "first-order")
