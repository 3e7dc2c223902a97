"""The whole way: two checkpoints and prompts in, a score file out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.criteria import SMALL_GAP, Criteria, CriterionFunction, named, source_sha256
from mergekit_wp.errors import OutOfMemory, UserError, option
from mergekit_wp.files.atomic import refuse_existing
from mergekit_wp.files.container import COUNTS
from mergekit_wp.files.manifest import DRAWS, Agreement, Manifest, ModelId, Scale
from mergekit_wp.files.scorefile import ScoreFile, read, write
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.memory import (
    AtOnce,
    free_memory,
    is_out_of_memory,
    resident_memory,
)
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Prompt, PromptBatch, Sample, read_prompts
from mergekit_wp.runs.cluster import SentModels, moved
from mergekit_wp.runs.command import command_of, versions
from mergekit_wp.runs.journal import Journal, begun
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.runs.references import (
    MIN_HELD_OUT,
    References,
    contrast_batches,
    measure_references,
)
from mergekit_wp.runs.run import Opened, Run, check_journal, journal_of
from mergekit_wp.runs.texts import Footprint
from mergekit_wp.runs.warnings import (
    memory_used,
    tell_prompts_needed,
    warn_of_completeness,
    warn_of_dtype,
    warn_of_references,
)
from mergekit_wp.scoring.measure import Blocks
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.sweeps import Sweeps
from mergekit_wp.statistics import Array, between_halves, leads
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand, Kind, of_activations

#: the journal's entry of how many sequences a forward pass takes
BATCH_SIZE = "batch-size"


@dataclass(frozen=True)
class ScoreOpened(Opened):
    """A score that can begin."""

    request: ScoreRequest
    criteria: Criteria


def score(request: ScoreRequest, progress: Progress) -> ScoreFile:
    """Run the sweeps, and write the score file where the request says so.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
    before = resident_memory()
    prompts = read_prompts(request.prompts, request.max_prompts)
    criteria, functions = named(choose_criteria(request.criterion, prompts.prompts))
    _check_request(request, criteria, prompts.prompts, progress)
    refuse_existing(request.out, request.overwrite)
    date = begun(request.out, request.restart)
    run = Run.open(request, request.base, request.expert, prompts, progress, date)
    request = _within_the_map(request, run.pair, progress)
    kept: dict[str, Any] = {
        "restart": request.restart,
        "criterion": [_identity(name, functions.get(name)) for name in criteria],
    }
    check = partial(check_journal, request, run, request.out, **kept)
    warn_of_dtype(request, progress)
    progress.plan(ScoreOpened(request, (run,), check, criteria))
    with journal_of(request, run, request.out, progress, **kept) as journal:
        resident = run.load()
        if request.max_memory is not None:
            progress.note(f"weights: {resident.where}")
        samples = [Sample(tuple(ids)) for ids in run.texts.prompts]
        if any(c != "anchor" for c in criteria):
            samples = run.samples(resident, journal)
        footprint = Footprint.of(run.pair, resident.dtype)
        progress.stage("base and expert on the prompts", 1, "pair")
        size, references = _references(
            request, run, criteria, functions, resident, samples, journal
        )
        progress.advance(1)
        warn_of_references(references, progress)
        recordings = Recordings(resident, references, criteria)
        at_once = AtOnce(size, progress.note, recordings.forget)

        def assignment(models: SentModels) -> Blocks:
            sent = moved(references, "cpu")
            return Blocks(models, sent, recordings.criteria, at_once.size)

        with run.jobs(journal, resident, assignment) as jobs:
            sweeps = Sweeps(request, recordings, at_once, jobs)
            _tell_of_left_out(sweeps)
            sweeps.all()
        warn_of_completeness(sweeps.completeness, progress)
        manifest = _manifest(request, run, references, sweeps, journal.created)
        tell_prompts_needed(manifest, progress)
        result = ScoreFile(manifest, score_tensors(sweeps))
        if request.out is not None:
            write(result, request.out)
        journal.discard()
    progress.note(memory_used(before, resident, footprint, samples, at_once.size))
    return result


def score_tensors(sweeps: Sweeps) -> dict[str, torch.Tensor]:
    """All tensors of the score file."""
    tensors: dict[str, torch.Tensor] = {}
    recordings = sweeps.recordings
    for estimand, c, kind in sweeps.changes:
        if kind not in sweeps.request.kinds:
            continue
        key = f"{estimand}/{c}/{kind}"
        scores, errors = sweeps.scores(estimand, c, kind)
        tensors[key] = scores.float()
        if recordings.n_prompts > 1:
            tensors[f"{key}.se"] = errors.float()
        found = leads(*_by_prompt(sweeps, estimand, c, kind), sweeps.request.seed, DRAWS)
        if found is not None:
            tensors[f"{key}{COUNTS}"] = torch.from_numpy(found).view(scores.shape)
    norms = list(recordings.pair.delta_norm.values())
    tensors["delta_norm"] = torch.tensor(norms, dtype=torch.float32)
    anchor = recordings.references.targets[0].anchor
    if anchor is not None:
        tensors["anchor/vector"] = anchor.vector.float().cpu()
    return tensors


def _manifest(
    request: ScoreRequest, run: Run, references: References, sweeps: Sweeps, created: str
) -> Manifest:
    return Manifest(
        **common_fields(request, run, references),
        criteria=sweeps.criteria,
        estimands=request.estimand,
        left_out=sweeps.left_out,
        anchor=references.anchor,
        fidelity=sweeps.fidelity,
        noise_floor=sweeps.noise,
        completeness=sweeps.completeness,
        stability=tuple(_halves(sweeps)),
        company=None,
        command=command_of(request),
        created=created,
    )


def common_fields(request: ScoreRequest, run: Run, references: References) -> dict[str, Any]:
    """What every manifest says: the models, the prompts, the reference values."""
    pair, prompts = run.pair, run.prompts
    return {
        "base": model_id(pair.base),
        "expert": model_id(pair.expert),
        "behavior": request.behavior or prompts.name,
        "n_prompts": len(prompts.prompts),
        "prompts_sha256": prompts.sha256,
        "prompt_digests": prompts.digests,
        "responses": prompts.responses,
        "template_date": run.template_date,
        "architecture": pair.base.architecture,
        **pair.partition.dims.numbers,
        "hidden_size": int(pair.base.text_config.hidden_size),
        "kinds": request.kinds,
        "scale": {
            name: Scale(base=float(r.base.mean()), expert=float(r.expert.mean()))
            for name, r in references.values.items()
        },
        "tensor_names": pair.partition.tensor_names,
        "dtype": request.dtype,
        "seed": request.seed,
        "versions": versions(),
    }


def model_id(checkpoint: Checkpoint) -> ModelId:
    """What a manifest says of a checkpoint."""
    return ModelId(
        reference=checkpoint.name,
        revision=checkpoint.revision,
        config_hash=checkpoint.config_hash,
        weights_dtype=checkpoint.weights_dtype,
    )


def _by_prompt(
    sweeps: Sweeps, estimand: Estimand, c: CriterionName, kind: Kind
) -> tuple[Array, Array]:
    """Changes ``[prompts, components]`` and distances ``[prompts]``, as statistics take them."""
    changes, distance = sweeps.quotients(estimand, c, kind)
    return changes.flatten(0, -2).T.numpy(), distance.cpu().numpy()


def _halves(sweeps: Sweeps) -> Iterator[Agreement]:
    """How alike the rankings by random halves of the prompts are, kind by kind."""
    for estimand, c, kind in sweeps.changes:
        if kind not in sweeps.request.kinds:
            continue
        by_prompt = _by_prompt(sweeps, estimand, c, kind)
        found = between_halves(*by_prompt, sweeps.request.seed)
        if found is not None:
            yield Agreement(
                against="halves",
                name="",
                estimand=estimand,
                criterion=c,
                kind=kind,
                **vars(found),
            )


def _references(
    request: ScoreRequest,
    run: Run,
    criteria: Criteria,
    functions: Mapping[CriterionName, CriterionFunction],
    resident: ResidentModel,
    samples: Sequence[Sample],
    journal: Journal,
) -> tuple[int, References]:
    """Base and expert on the prompts, and the sequences a forward pass that memory was there for.

    As many as asked for, as in the run that is continued, or as seem to fit.
    """
    earlier = journal.load(BATCH_SIZE)

    def measured(size: int) -> References:
        contrasts: tuple[list[int], list[PromptBatch]] = ([], [])
        if "anchor" in criteria:
            contrasts = contrast_batches(run.texts.contrasts, size, resident)
        return measure_references(
            resident,
            samples,
            criteria,
            size,
            contrasts=contrasts,
            anchor_layer=request.anchor_layer,
            functions=functions,
        )

    if earlier is not None:
        size = int(earlier["sequences"])
        try:
            return size, measured(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        raise OutOfMemory(
            f"this run was begun with {size} sequences per forward pass, for which there is "
            f"no memory now; free some, or add {option('restart', True)} to begin anew"
        )
    size = run.batch_size(samples)
    if request.batch_size is None:
        fits = Footprint.of(run.pair, resident.dtype).fits(samples, free_memory(request.device))
        size = min(size, fits)
    at_once = AtOnce(size, run.progress.note)
    references = at_once.run(measured)
    journal.block(BATCH_SIZE, lambda: {"sequences": torch.tensor([at_once.size])})
    return at_once.size, references


def choose_criteria(
    asked: tuple[CriterionName | CriterionFunction, ...] | None, prompts: Sequence[Prompt]
) -> tuple[CriterionName | CriterionFunction, ...]:
    """The criteria to use: ``kl``, and ``anchor`` too when contrasts are given (two or more).

    Raises:
        UserError: the anchor is asked for and contrasts are given but none can be used.
    """
    given = any(p.contrast is not None for p in prompts)
    usable = sum(p.usable_contrast for p in prompts)
    default: Criteria = ("kl", "anchor") if usable >= MIN_HELD_OUT else ("kl",)
    if (asked is None or "anchor" in asked) and given and not usable:
        raise UserError(
            "no usable contrast: every 'contrast' is empty or equal to its prompt; give the same "
            "request without the instruction, or leave 'contrast' out for the base-to-expert anchor"
        )
    return asked or default


def _check_request(
    request: ScoreRequest,
    criteria: Sequence[str],
    prompts: Sequence[Prompt],
    progress: Progress,
) -> None:
    """Refuse what would fail or surprise after hours of work."""
    if request.anchor_layer is not None and "anchor" not in criteria:
        raise UserError(
            f"{option('anchor_layer')} is set, but the anchor is not scored: add "
            f"{option('criterion', 'anchor')}"
        )
    if request.criterion is None and sum(p.usable_contrast for p in prompts) == 1:
        progress.note("only one prompt has a contrast, too few for an anchor; scoring kl alone")
    if request.out is not None:
        _check_out(request.out)


def _check_out(out: Path) -> None:
    """Refuse to write over what is no score file."""
    try:
        exists = out.is_file()
    except OSError as error:  # a name too long, say
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    if exists:
        try:
            read(out)
        except UserError as error:
            raise UserError(
                f"{option('out', out)} exists and is no score file; choose another name"
            ) from error


def _within_the_map(request: ScoreRequest, pair: Pair, progress: Progress) -> ScoreRequest:
    """Leave heads, K/V groups and neurons out where the architecture has no map of them.

    Raises:
        UserError: nothing else was asked for.
    """
    dims = pair.partition.dims
    if dims.architecture.mapped:
        return request
    kinds = tuple(kind for kind in request.kinds if kind not in SLICED_KINDS)
    if not kinds:
        dims.require_map(option("kinds", ",".join(request.kinds)))
    for estimand in request.estimand:
        if of_activations(estimand):
            dims.require_map(option("estimand", estimand))
    progress.note(
        f"'{dims.architecture.class_name}' has no component map: scoring "
        f"{' and '.join(f'{kind}s' for kind in kinds)} only, by whole forward passes"
    )
    return request.model_copy(update={"kinds": kinds})


def _identity(name: CriterionName, function: CriterionFunction | None) -> str:
    """A criterion as a journal knows it: a caller's function by its source too."""
    return name if function is None else f"{name} {source_sha256(function)}"


def _tell_of_left_out(sweeps: Sweeps) -> None:
    """Say which prompts base and expert are too much alike on to be divided by."""
    for name, members in (sweeps.left_out or {}).items():
        if members:
            numbers = ", ".join(str(member + 1) for member in members[:8])
            numbers += " and others" if len(members) > 8 else ""
            sweeps.jobs.progress.note(
                f"'{name}' by prompt leaves {len(members)} of {sweeps.recordings.n_prompts} "
                f"prompts out, {numbers}: base and expert differ there by less than "
                f"{SMALL_GAP:.0%} of what they do on the mean"
            )
