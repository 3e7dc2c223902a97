"""Who supplies the components that matter: path patches between components.

For the components with the largest effect by activations, every earlier component's supply to
their input is estimated to first order, and measured exactly for the leading ones: once with the
supplier's weights from the expert, once with what it writes in the expert's run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergekit_wp.components import Partition
from mergekit_wp.engine.paths import Place
from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.mechanism.request import TraceRequest
from mergekit_wp.mechanism.supplies import Circuits, Supplies
from mergekit_wp.mechanism.tracer import Tracer
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import read_prompts
from mergekit_wp.runs.cluster import SentModels, moved
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.journal import begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.runs.references import anchor_of, measure_references
from mergekit_wp.runs.run import Opened, Run, check_journal, journal_of
from mergekit_wp.runs.scored import check_pair, check_scores, scored_model
from mergekit_wp.runs.warnings import warn_of_dtype
from mergekit_wp.terms import CriterionName, FineKind

#: components whose suppliers are looked for
TARGET_KINDS: tuple[FineKind, ...] = ("head", "neuron")


@dataclass(frozen=True)
class TraceOpened(Opened):
    """A circuit that can be traced, to some targets."""

    request: TraceRequest
    targets: tuple[Place, ...]


def trace(request: TraceRequest, progress: Progress) -> TraceFile:
    """Trace the suppliers of a score file's leading components.

    Returns:
        What is written to the request's ``out``, if it has one.

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
    date = begun(request.out, request.restart)
    run = Run.open(request, base, expert, prompts, progress, date)
    check_pair(file, run.pair, request.file)
    check_traceable(run.pair.partition)
    kept: dict[str, Any] = {"restart": request.restart, "scores": file.digest()}
    check = partial(check_journal, request, run, request.out, **kept)
    warn_of_dtype(request, progress)
    progress.plan(TraceOpened(request, (run,), check, tuple(targets)))
    with journal_of(request, run, request.out, progress, **kept) as journal:
        resident = run.load()
        samples = run.samples(resident, journal)
        size, anchor = run.batch_size(samples), anchor_of(file, resident)
        at_once = AtOnce(size, progress.note)
        references = at_once.run(
            lambda few: measure_references(
                resident, samples, (criterion,), size, few, anchor=anchor
            )
        )
        recordings = Recordings(resident, references, (criterion,))
        at_once.forget = recordings.forget

        def assignment(models: SentModels) -> Circuits:
            sent = moved(references, "cpu")
            return Circuits(models, sent, criterion, tuple(targets), at_once.size)

        with run.jobs(journal, resident, assignment) as jobs:
            supplies = Supplies(recordings, at_once, targets)
            nodes, edges, screen = Tracer(request, supplies, jobs).circuit()
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
            template_date=run.template_date,
        )
        if request.out is not None:
            circuitfile.write(result, request.out)
        journal.discard()
    return result


def check_traceable(partition: Partition) -> None:
    """Refuse architectures in which a component has no place that it always writes to.

    Raises:
        UserError: says why.
    """
    partition.dims.require_map("trace")
    if any(len(partition.layouts[name].dims) > 1 for name in partition.layer_tensors(0)):
        raise UserError(
            "trace follows what components add to the residual stream at every position; "
            f"'{partition.dims.architecture.model_type}' sends positions to different experts"
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
