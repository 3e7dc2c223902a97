"""What fitting the gates of experts takes."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_wp.costs import memory
from mergekit_wp.costs.model_size import PairSize
from mergekit_wp.costs.passes import TextBatch, Texts, forward, mixed, opening, slopes
from mergekit_wp.costs.scoring import asking, referring
from mergekit_wp.costs.work import Costs, Held, Stage, Work, fullest, total
from mergekit_wp.joint.fit import FitOpened, split_of
from mergekit_wp.joint.front import SHARE
from mergekit_wp.joint.judging import LOOK
from mergekit_wp.models.memory import free_memory
from mergekit_wp.models.model_names import distinct_names
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import Opened, Run

#: vectors of all gates, in float64, that a fit holds: where it stands, Adam's means, what is kept,
#: the slopes, and those that one step makes of them; so many more for every guard
GATES, OF_GUARD = 15, 4


def fit(opened: FitOpened) -> Costs:
    """The whole of `fit`, with as many steps as it may take at most."""
    request = opened.request
    pairs = [PairSize.of(run.pair) for run in opened.runs]
    texts = [Texts.of(run) for run in opened.runs]
    guards = [Texts.of(run) for run in opened.guards]
    first = opened.runs[0].pair
    every = [own.packed(opened.a_step, first) for own in (*texts, *guards)]
    judged = [
        _drawn(own, len(split_of(request, len(text.samples)).judged) / len(text.samples))
        for text, own in zip([*texts, *guards], every, strict=True)
    ]
    size = pairs[0].size
    step = _slopes(opened, pairs, [_mean(own) for own in every]) + mixed(pairs)
    look = mixed(pairs) + forward(size, judged)
    climbs = [request.steps, *[max(1, request.steps // SHARE)] * len(request.front)]
    steps = sum(climbs)
    looks = sum(1 + -(-most // LOOK) for most in climbs)
    said = f"at most {steps:,} steps of {step.flops / 1e12:.3g} TFLOP"
    base = pairs[0].base
    guarding = forward(size, [b for own in every[len(texts) :] for b in own])
    stages = [
        *_begun(opened, pairs, texts, [opened.a_step] * len(pairs)),
        *(s for own in guards for s in asking(pairs[0], own, None, "base")),
        *([Stage("base on guards", guarding + Work(read=base) * len(guards))] if guards else []),
        Stage("fitting gates", step * steps, said),
        Stage("judging gates", look * looks, f"every {LOOK} steps"),
    ]
    terms = [max(own, key=lambda batch: batch.tokens) for own in every]
    vectors = GATES + OF_GUARD * len(guards)
    held = _held(pairs, [*texts, *guards], terms, opened.runs[0], 8.0 * vectors * opened.gates)
    state = 8.0 * (5 + len(guards)) * opened.gates
    notes = ("a fit ends earlier where nothing more is gained",)
    return Costs(tuple(stages), held, 8.0 * opened.gates, passing=state, notes=notes)


def _slopes(opened: Opened, pairs: Sequence[PairSize], terms: Sequence[TextBatch]) -> Work:
    """Slopes of one step, with as much kept as there is memory for."""
    request = opened.request
    width, free = DTYPES[request.dtype].itemsize, free_memory(request.device)
    return slopes(pairs, terms, kept=memory.kept(pairs[0].size, terms, width, free))


def _begun(
    opened: Opened, pairs: Sequence[PairSize], texts: Sequence[Texts], sizes: Sequence[int]
) -> list[Stage]:
    """Opening all pairs, hashing, and base and expert on each one's prompts."""
    # the experts' hashes tell whether two are the same, whether or not a journal is kept
    opened_all = total(opening(pair) + Work(read=pair.files[1]) for pair in pairs)
    base = pairs[0].files[0]
    kept = getattr(opened.request, "out", None) is not None
    found = [Stage("opening and comparing", opened_all, done=True)]
    if kept:
        found.append(Stage("hashing weights", Work(read=base, passed=base / 4)))
    for run, pair, own, size in zip(opened.runs, pairs, texts, sizes, strict=True):
        found += asking(pair, own, opened.request.batch_size)
        work = referring(pair, own, size, pair.base + pair.expert)
        [name] = distinct_names([run.pair.expert.name])
        found.append(Stage(f"base and {name} on the prompts", work))
    return found


def _mean(batches: Sequence[TextBatch]) -> TextBatch:
    """The batch that stands for some, which are drawn at random."""
    n = len(batches)
    rows = sum(batch.rows for batch in batches)
    width = sum(batch.tokens for batch in batches) / max(1, rows)
    positions = sum(batch.positions for batch in batches)
    return TextBatch(rows / n, width, positions / n)


def _drawn(batches: Sequence[TextBatch], part: float) -> TextBatch:
    """The batch that stands for a part of the prompts in some, drawn at random."""
    mean, n = _mean(batches), len(batches)
    return TextBatch(part * n * mean.rows, mean.width, part * n * mean.positions)


def _held(
    pairs: Sequence[PairSize],
    texts: Sequence[Texts],
    terms: Sequence[TextBatch],
    run: Run,
    gates: float,
) -> tuple[Held, ...]:
    """When memory is fullest: while slopes are taken."""
    size, width = pairs[0].size, DTYPES[run.request.dtype].itemsize
    held = [
        memory.model(size, width),
        memory.teachers(size, texts),
        Held("gates", gates, on_device=False),
        memory.recordings(size, terms, width, each=1),
    ]
    free = free_memory(run.request.device)
    return fullest([*held, *memory.slopes_at_work(pairs, terms, width, free)])
