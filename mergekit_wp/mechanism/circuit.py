"""Who supplies the components that matter: path patches between components.

For the components with the largest effect by activations, every earlier component's supply to
their input is estimated to first order, and measured exactly for the leading ones: once with the
supplier's weights from the expert, once with what it writes in the expert's run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import mergekit_wp
from mergekit_wp.components import Partition
from mergekit_wp.criteria import AnchorDirection, Criteria, Targets, recovery
from mergekit_wp.engine.block_changes import Changes
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.gradients import criterion_gradients, record_with_gradients
from mergekit_wp.engine.paths import (
    Place,
    supplied,
    supply_gradient,
    written_anew,
    written_to_the_end,
)
from mergekit_wp.engine.replay import Trace, own_values
from mergekit_wp.engine.weight_swaps import Values
from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.files.circuitfile import Edge, Measured, Node, Screen, TraceFile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.mechanism.roles import is_edge, role
from mergekit_wp.models.backoff import fitting
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import read_prompts
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Block, SweepContext
from mergekit_wp.runs.references import references_at
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import check_pair, check_scores, open_inputs, scored_model
from mergekit_wp.runs.texts import auto_batch_size, with_responses
from mergekit_wp.scoring.fidelity import verdict
from mergekit_wp.terms import CriterionName, Estimand, FineKind, Via

#: components whose suppliers are looked for, and kinds that supply: a head writes what its keys
#: and values let it, so these count beside it by their weights only
TARGET_KINDS: tuple[FineKind, ...] = ("head", "neuron")
SUPPLIER_KINDS: dict[Via, tuple[FineKind, ...]] = {
    "weights": ("head", "kv_group", "neuron"),
    "activations": ("head", "neuron"),
}
_ESTIMAND: dict[Via, Estimand] = {"weights": "gain", "activations": "activation_gain"}


def trace(request: TraceRequest, progress: Progress) -> TraceFile:
    """Trace the suppliers of a score file's leading components, and write the trace file.

    Raises:
        UserError: any mistake in the inputs, before anything is measured.
    """
    file = scorefile.read(request.file)
    criterion = request.criterion or file.manifest.criteria[0]
    check_scores(file, request.file, ("activation_gain",), criterion)
    targets = leading(file, criterion, request.targets)
    if not targets:
        raise UserError(
            f"score file {request.file}: no head or neuron has activation_gain/{criterion} above "
            "zero, so there is nothing to trace"
        )
    prompts = read_prompts(request.prompts, request.max_prompts)
    base = request.base or scored_model(file.manifest.base)
    expert = request.expert or scored_model(file.manifest.expert)
    opened = open_inputs(base, expert, prompts.prompts, request.prompts, progress)
    check_pair(file, opened.pair, request.file)
    check_traceable(opened.pair.partition, opened.pair.base.text_config)
    inputs = {
        **request.model_dump(mode="json", exclude={"restart", "file", "out", "builtin", "rules"}),
        "scores": file.digest(),
        "prompts": prompts.sha256,
        "tokens": opened.texts.sha256(),
        "base weights": opened.pair.base.weights_sha256(),
        "expert weights": opened.pair.expert.weights_sha256(),
        "mergekit-wp": mergekit_wp.__version__,
    }
    with Journal(request.out, inputs, request.restart) as journal:
        resident = ResidentModel(opened.pair, DTYPES[request.dtype], request.device)
        samples = with_responses(
            request, opened.texts, opened.tokenizer, resident, journal, progress
        )
        size = request.batch_size or auto_batch_size(samples, opened.vocabulary, request.device)
        anchor = _anchor(file, resident)
        at_once, references = fitting(
            size,
            lambda at_once: references_at(resident, samples, (criterion,), anchor, size, at_once),
            progress.note,
        )
        context = SweepContext(resident, references, (criterion,), at_once)
        tracer = Tracer(request, context, criterion, targets, journal, progress)
        nodes, edges, screen = tracer.circuit()
        result = TraceFile(
            behavior=file.manifest.behavior,
            base=base,
            expert=expert,
            scores_sha256=file.digest(),
            prompts_sha256=prompts.sha256,
            n_prompts=len(samples),
            n_layers=file.manifest.n_layers,
            criterion=criterion,
            rules=request.rules,
            screen=screen,
            nodes=nodes,
            edges=edges,
            seed=request.seed,
            command=command_of(request),
            versions=versions(),
        )
        circuitfile.write(result, request.out)
        journal.discard()
    return result


def check_traceable(partition: Partition, config: Any) -> None:
    """Refuse architectures in which a block's change is not what later blocks read.

    Raises:
        UserError: says why.
    """
    partition.dims.require_map("trace")
    architecture, why = partition.dims.architecture, None
    if not architecture.plain_residual:
        why = "puts a norm or factor between its blocks and the residual stream"
    elif architecture.parallel(config):
        why = "runs attention and MLP side by side"
    elif any(len(partition.layouts[name].dims) > 1 for name in partition.layer_tensors(0)):
        why = "sends positions to different experts"
    if why:
        raise UserError(
            f"trace follows what blocks add to the residual stream; '{config.model_type}' {why}"
        )


def leading(file: ScoreFile, criterion: CriterionName, count: int) -> list[Place]:
    """Heads and neurons with the largest effect by activations, in the order of the layers."""
    found = []
    for kind in TARGET_KINDS:
        if kind in file.manifest.kinds:
            scores = file.scores("activation_gain", criterion, kind)
            top = torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]
            for flat in top.tolist():
                layer, index = divmod(flat, scores.shape[1])
                found.append((float(scores[layer, index]), Place(layer, kind, index)))
    best = sorted((x for x in found if x[0] > 0), key=lambda x: -x[0])[:count]
    return sorted(place for _, place in best)


def _anchor(file: ScoreFile, resident: ResidentModel) -> AnchorDirection | None:
    if file.manifest.anchor is None:
        return None
    vector = file.tensors["anchor/vector"].to(resident.device)
    wide = torch.promote_types(resident.dtype, torch.float32)
    return AnchorDirection(vector.to(wide), file.manifest.anchor.layer)


Patch = Callable[[Decoder, Place, Trace, torch.Tensor, Criteria, Targets], Values]


@dataclass(frozen=True)
class SupplyPair:
    """One supply to measure exactly; ``leading`` by the screen, else drawn at random."""

    target: Place
    via: Via
    source: Place
    screened: float
    leading: bool


class Tracer:
    """Screens, measures and names one circuit."""

    def __init__(
        self,
        request: TraceRequest,
        context: SweepContext,
        criterion: CriterionName,
        targets: Sequence[Place],
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.request, self.context, self.criterion = request, context, criterion
        self.targets, self.journal, self.progress = targets, journal, progress
        self.dims = context.partition.dims
        self.distance = context.references.values[criterion].distance.double()

    def circuit(self) -> tuple[tuple[Node, ...], tuple[Edge, ...], Screen]:
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

    def _kept(self, block: Block) -> dict[str, torch.Tensor]:
        """A block from the journal, or run and kept there."""
        run = partial(self.context.fitting, block, self.progress.note)
        found, resumed = self.journal.block(block.key, run)
        self.progress.advance(block.cost, resumed=resumed)
        return found

    def _measured(self, change: torch.Tensor) -> Measured:
        value, error = recovery(change, self.distance)
        known = bool(torch.isfinite(error))
        return Measured(value=float(value), se=float(error) if known else None)

    # --- first-order screen -------------------------------------------------------------------

    def _screen(self) -> dict[tuple[int, Via, FineKind], torch.Tensor]:
        """First-order supplies ``[layers, count]`` to each target, by via and kind."""
        every = self.context.references.batches
        last = max(target.layer for target in self.targets)
        self.progress.stage("screening suppliers", len(every) * (last + 1), "layer")
        total: dict[str, torch.Tensor] = {}
        for b in range(len(every)):
            work = partial(self._screen_batch, b)
            block = Block(f"screen.batch{b:04d}", last + 1, work, b, prompts=None)
            for key, value in self._kept(block).items():
                total[key] = total.get(key, 0.0) + value.double()
        scale = self.context.n_prompts * float(self.distance.mean())
        return {
            (t, via, kind): total[f"{t}/{via}/{kind}"] / scale
            for t in range(len(self.targets))
            for via, kinds in SUPPLIER_KINDS.items()
            for kind in kinds
        }

    def _screen_batch(self, b: int) -> dict[str, torch.Tensor]:
        context, dims = self.context, self.dims
        context.resident.move_to(0.0)
        decoder, batch, targets = context.decoder, context.batch(b), context.targets(b)
        with_graph = record_with_gradients(decoder, batch)
        gradients = criterion_gradients(decoder, with_graph, (self.criterion,), targets)
        trace = context.trace(0.0, b)
        along = [
            supply_gradient(decoder, target, trace, gradients[self.criterion], dims)
            for target in self.targets
        ]
        found = {
            f"{t}/{via}/{kind}": torch.zeros((dims.n_layers, dims.count(kind)))
            for t in range(len(self.targets))
            for via, kinds in SUPPLIER_KINDS.items()
            for kind in kinds
        }
        with torch.no_grad():
            for layer in range(max(target.layer for target in self.targets) + 1):
                for via, inputs in self._inputs(layer, trace).items():
                    for t, (target, gradient) in enumerate(zip(self.targets, along, strict=True)):
                        for kind in SUPPLIER_KINDS[via]:
                            if gradient is not None and target.reads(Place(layer, kind, 0)):
                                change = inputs[kind].project(gradient).sum(0)
                                found[f"{t}/{via}/{kind}"][layer] = change.float().cpu()
        return found

    def _inputs(self, layer: int, trace: Trace) -> Mapping[Via, Mapping[FineKind, Changes]]:
        """Changes of a layer's components by weights and by activations, where there are any."""
        return {
            via: self.context.inputs(estimand, layer, trace)
            for via, estimand in _ESTIMAND.items()
            if self.context.differs(estimand, "layer", layer)
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
                    if target.reads(Place(layer, kind, 0))
                ]
                if not places:
                    continue
                flat = torch.cat([screened[t, via, kind][p.layer] for p, kind in places])
                widths = [self.dims.count(kind) for _, kind in places]
                starts = torch.tensor([0, *widths]).cumsum(0)
                order = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
                top = [i for i in order.tolist() if flat[i] != 0]
                nonzero = flat.nonzero().flatten()
                drawn = nonzero[torch.randperm(len(nonzero), generator=generator)[:count]]
                for i in sorted({*top, *drawn.tolist()}):
                    which = int(torch.searchsorted(starts, i, right=True)) - 1
                    place, kind = places[which]
                    source = Place(place.layer, kind, i - int(starts[which]))
                    yield SupplyPair(target, via, source, float(flat[i]), i in set(top))

    def _supplies(self, pairs: Sequence[SupplyPair]) -> list[Measured]:
        """Exact supply of every pair."""
        changes = torch.zeros((len(pairs), self.context.n_prompts), dtype=torch.float64)
        by_layer: dict[int, list[int]] = {}
        for p, pair in enumerate(pairs):
            by_layer.setdefault(pair.source.layer, []).append(p)
        every = self.context.references.batches
        self.progress.stage("measuring supplies", len(every) * len(pairs), "path")
        for b, batch in enumerate(every):
            for layer, members in sorted(by_layer.items()):
                work = partial(self._supply, b, layer, [pairs[p] for p in members])
                key = f"supplies.batch{b:04d}.layer{layer:04d}"
                found = self._kept(Block(key, len(members), work, b))
                rows = torch.tensor(members).unsqueeze(-1)
                changes[rows, batch.members] = found["changes"].double()
        return [self._measured(change) for change in changes]

    @torch.no_grad()
    def _supply(self, b: int, layer: int, pairs: Sequence[SupplyPair]) -> dict[str, torch.Tensor]:
        context = self.context
        trace, decoder = context.trace(0.0, b), context.decoder
        targets, criteria = context.targets(b), context.criteria
        own = own_values(decoder, trace, criteria, targets)[self.criterion]
        inputs = self._inputs(layer, trace)
        found = torch.empty((len(pairs), trace.batch.size), dtype=torch.float64)
        copies = context.copies(trace.batch)
        groups: dict[tuple[Place, Via, FineKind], list[int]] = {}
        for p, pair in enumerate(pairs):
            groups.setdefault((pair.target, pair.via, pair.source.kind), []).append(p)
        for (target, via, kind), members in groups.items():
            for start in range(0, len(members), copies):
                some = members[start : start + copies]
                change = inputs[via][kind].changes([pairs[p].source.index for p in some])
                values = supplied(decoder, target, trace, change, self.dims, criteria, targets)
                found[some] = (values[self.criterion] - own).double().cpu()
        return {"changes": found}

    # --- nodes --------------------------------------------------------------------------------

    def _effects(self, places: Sequence[Place]) -> dict[Place, tuple[Measured, Measured, Measured]]:
        """Exact gain, effect by activations and its direct part of every component."""
        if not places:
            return {}
        changes = torch.zeros((len(places), 3, self.context.n_prompts), dtype=torch.float64)
        every = self.context.references.batches
        self.progress.stage("measuring components", len(every) * len(places), "component")
        for b, batch in enumerate(every):
            for p, place in enumerate(places):
                key = f"effect.{place.name.replace(' ', '-')}.batch{b:04d}"
                found = self._kept(Block(key, 1, partial(self._effect, b, place), b))
                changes[p][:, batch.members] = found["changes"].double()
        return {
            place: (self._measured(of[0]), self._measured(of[1]), self._measured(of[2]))
            for place, of in zip(places, changes, strict=True)
        }

    @torch.no_grad()
    def _effect(self, b: int, place: Place) -> dict[str, torch.Tensor]:
        context = self.context
        trace, decoder = context.trace(0.0, b), context.decoder
        targets, criteria = context.targets(b), context.criteria
        own = own_values(decoder, trace, criteria, targets)[self.criterion]
        found = torch.zeros((3, trace.batch.size), dtype=torch.float64)
        inputs = self._inputs(place.layer, trace)
        patches: tuple[tuple[Via, Patch], ...] = (
            ("weights", written_anew),
            ("activations", written_anew),
            ("activations", written_to_the_end),
        )
        for row, (via, patch) in enumerate(patches):
            if via in inputs:
                change = inputs[via][place.kind].changes([place.index])
                values = patch(decoder, place, trace, change, criteria, targets)
                found[row] = (values[self.criterion][0] - own).double().cpu()
        return {"changes": found}

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

    def _fidelity(self, pairs: Sequence[SupplyPair], supplies: Sequence[Measured]) -> Screen:
        predicted = torch.tensor([pair.screened for pair in pairs], dtype=torch.float64)
        exact = torch.tensor([supply.value for supply in supplies], dtype=torch.float64)
        top = [p for p, pair in enumerate(pairs) if pair.leading]
        drawn = [p for p, pair in enumerate(pairs) if not pair.leading]
        found = verdict(predicted, exact, top, drawn, "first-order")
        return Screen(
            leading=len(top),
            random=len(drawn),
            pearson=found.pearson,
            spearman=found.spearman,
            pearson_random=found.pearson_random,
            largest_missed=found.largest_missed,
        )
