"""The whole way: two checkpoints and a prompt file in, a score file out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import mergekit_wp
from mergekit_wp.criteria import Criteria, CriterionFunction, named, source_sha256
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.scorefile import ScoreFile, read, write
from mergekit_wp.models.backoff import fitting
from mergekit_wp.models.memory import (
    free_memory,
    in_gib,
    is_out_of_memory,
    peak_memory,
    peak_on_gpus,
    resident_memory,
)
from mergekit_wp.models.pair import Pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Prompt, PromptFile, Sample, read_prompts
from mergekit_wp.runs.anchor import MIN_HELD_OUT
from mergekit_wp.runs.journal import Journal
from mergekit_wp.runs.progress import Progress
from mergekit_wp.runs.recordings import SweepContext
from mergekit_wp.runs.references import References, contrast_batches, measure_references
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import open_inputs
from mergekit_wp.runs.texts import Encoded, Footprint, auto_batch_size, with_responses
from mergekit_wp.scoring.assemble import make_manifest, score_tensors
from mergekit_wp.scoring.cluster import cluster, installed
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.sweeps import SweepRun
from mergekit_wp.terms import SLICED_KINDS, CriterionName, of_activations

#: the journal's entry of how many sequences a forward pass takes
BATCH_SIZE = "batch-size"


def score(request: ScoreRequest, progress: Progress) -> ScoreFile:
    """Run the sweeps and write the score file.

    Raises:
        UserError: any mistake in the inputs, before anything is written.
    """
    before = resident_memory()
    prompt_file = read_prompts(request.prompts, request.max_prompts)
    criteria, functions = named(choose_criteria(request.criterion, prompt_file.prompts))
    _check_request(request, criteria, prompt_file.prompts, progress)
    opened = open_inputs(
        request.base, request.expert, prompt_file.prompts, request.prompts, progress
    )
    pair, tokenizer, texts = opened.pair, opened.tokenizer, opened.texts
    request = _within_the_map(request, pair, progress)
    progress.stage("hashing weights", 1, "pair")
    identified = [_identity(name, functions.get(name)) for name in criteria]
    inputs = _inputs(request, pair, prompt_file, identified, texts)
    progress.advance(1)
    with Journal(request.out, inputs, request.restart) as journal:
        if journal.resumed:
            progress.note(f"continuing the run in {journal.folder}")
        resident = ResidentModel(pair, DTYPES[request.dtype], request.device, request.max_memory)
        if request.max_memory is not None:
            progress.note(f"weights: {resident.where}")
        samples = [Sample(tuple(ids)) for ids in texts.prompts]
        if any(c != "anchor" for c in criteria):
            samples = with_responses(request, texts, tokenizer, resident, journal, progress)
        footprint = Footprint.of(pair, resident.dtype)
        progress.stage("base and expert on the prompts", 1, "pair")
        batch_size, references = _fitting(
            _first_size(request, samples, opened.vocabulary, footprint, journal),
            lambda size: measure_references(
                resident,
                samples,
                contrast_batches(texts.contrasts, size, request.device)
                if "anchor" in criteria
                else ([], []),
                criteria,
                request.anchor_layer,
                size,
                functions=functions,
            ),
            progress,
            fixed=journal.load(BATCH_SIZE) is not None,
        )
        journal.block(BATCH_SIZE, lambda: {"sequences": torch.tensor([batch_size])})
        progress.advance(1)
        warn_of_wrong_sign(references, progress)
        context = SweepContext(resident, references, criteria, batch_size)
        with cluster(context, progress) if request.ray else nullcontext() as workers:
            run = SweepRun(request, context, journal, progress, workers)
            run.all()
        result = ScoreFile(
            make_manifest(request, pair, prompt_file, criteria, references, run, journal.created),
            score_tensors(run, pair, references),
        )
        write(result, request.out)
        journal.discard()
    progress.note(memory_used(before, resident, footprint, samples, context.batch_size))
    return result


def _first_size(
    request: ScoreRequest,
    samples: Sequence[Sample],
    vocabulary: int,
    footprint: Footprint,
    journal: Journal,
) -> int:
    """Sequences per forward: as asked, as in the run that is continued, or what seems to fit."""
    if (earlier := journal.load(BATCH_SIZE)) is not None:
        return int(earlier["sequences"])
    if request.batch_size is not None:
        return request.batch_size
    fitting = footprint.fits(samples, free_memory(request.device))
    return min(fitting, auto_batch_size(samples, vocabulary, request.device))


def _fitting(
    size: int, run: Callable[[int], References], progress: Progress, *, fixed: bool
) -> tuple[int, References]:
    """Halve the size until memory suffices, unless it is fixed by what is done already."""
    if not fixed:
        return fitting(size, run, progress.note)
    try:
        return size, run(size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise UserError(
        f"this run was begun with {size} sequences per forward pass, for which there is "
        f"no memory now; free some, or add {option('restart', True)} to begin anew"
    )


def memory_used(
    before: int,
    resident: ResidentModel,
    footprint: Footprint,
    samples: Sequence[Sample],
    sequences: int,
) -> str:
    """What this process has taken at most, beside what it was meant to take.

    Args:
        before: bytes that Python and its libraries had taken when the run began.
        resident: the model that was run.
        footprint: of the model.
        samples: that it ran on.
        sequences: per forward pass.
    """
    found = f"peak memory {in_gib(peak_memory())}"
    if (on_gpus := peak_on_gpus()) > 0:
        found += f", on GPUs {in_gib(on_gpus)}"
    budget = footprint.of_sequences(samples, sequences)
    fetched = f"; {in_gib(resident.fetched)} of weights were fetched" if resident.fetched else ""
    return (
        f"{found} (weights {resident.where}, activation budget {in_gib(budget)}, "
        f"Python and its libraries {in_gib(before)}){fetched}"
    )


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
    if request.ray:
        if request.max_memory is not None and set(request.max_memory) - {"0", "cpu"}:
            raise UserError(
                f"{option('max_memory')}: with {option('ray')} every worker has one GPU, which it "
                "calls 0"
            )
        if request.max_memory == {}:
            raise UserError(
                f"{option('device_map')} with {option('ray')} needs {option('max_memory')}: "
                "the workers of one machine do not know of each other what they take"
            )
        installed()
    if request.anchor_layer is not None and "anchor" not in criteria:
        raise UserError(
            f"{option('anchor_layer')} is set, but the anchor is not scored: add "
            f"{option('criterion', 'anchor')}"
        )
    if request.criterion is None and sum(p.usable_contrast for p in prompts) == 1:
        progress.note("only one prompt has a contrast, too few for an anchor; scoring kl alone")
    try:
        exists = request.out.is_file()
    except OSError as error:  # a name too long, say
        raise UserError(f"{request.out} cannot be written: {error.strerror}") from error
    if exists:
        try:
            read(request.out)
        except UserError as error:
            raise UserError(
                f"{option('out', request.out)} exists and is no score file; choose another name"
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


def _inputs(
    request: ScoreRequest,
    pair: Pair,
    prompts: PromptFile,
    criteria: Sequence[str],
    texts: Encoded,
) -> dict[str, Any]:
    """All that the results depend on, by the names a user knows."""
    places = {"out", "restart", "ray", "device_map", "max_memory"}
    options = request.model_dump(mode="json", exclude={*places, "prompts", "criterion"})
    return {
        **options,
        "criterion": list(criteria),
        "prompts": prompts.sha256,
        "tokens": texts.sha256(),
        "base weights": pair.base.weights_sha256(),
        "expert weights": pair.expert.weights_sha256(),
        "base config": pair.base.config_hash,
        "expert config": pair.expert.config_hash,
        "mergekit-wp": mergekit_wp.__version__,
    }


def warn_of_wrong_sign(references: References, progress: Progress) -> None:
    """Say when a criterion is lower for the expert than for the base."""
    for name, reference in references.values.items():
        if float(reference.distance.mean()) < 0:
            progress.note(
                f"warning: criterion '{name}' is lower for the expert than for the base "
                f"({float(reference.expert.mean()):.3g} against {float(reference.base.mean()):.3g})"
                "; its scores say what lowers it"
            )
