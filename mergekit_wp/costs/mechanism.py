"""What curves, circuits and anchors take."""

from __future__ import annotations

from mergekit_wp.costs import memory
from mergekit_wp.costs.answering import Asking, asked
from mergekit_wp.costs.model_size import PairSize
from mergekit_wp.costs.passes import (
    Texts,
    forward,
    gradients,
    head_flops,
    layer_flops,
    opening,
)
from mergekit_wp.costs.scoring import asking, hashing, referring
from mergekit_wp.costs.work import Costs, Held, Stage, Work, fullest
from mergekit_wp.mechanism.anchors import AnchorOpened
from mergekit_wp.mechanism.circuit import TraceOpened
from mergekit_wp.mechanism.supplies import SUPPLIER_KINDS
from mergekit_wp.mechanism.verify import VerifyOpened
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import Opened


def verifying(opened: VerifyOpened) -> Costs:
    """The whole of `verify`."""
    pair, texts, size = _sizes(opened)
    batches = texts.batches(size)
    measured = forward(pair.size, batches)
    task = Asking()
    if opened.task is not None:
        run, device = opened.runs[0], opened.request.device
        task = asked(pair.size, opened.task, "test", run.tokenizer, device)
    read = Work(read=pair.base + pair.expert, passed=2 * pair.size.parameters)
    said = f"{opened.models} models"
    if task.answers:
        said += f", {task.answers * opened.models:,} answers"
    sets = (measured + read + task.work) * opened.models
    teachers = forward(pair.size, batches) + Work(read=pair.expert)
    stages = [
        *_begun(opened, pair, texts, journal=True),
        Stage("the expert on the prompts", teachers),
        Stage("sets", sets, said),
    ]
    exchanged = Held("a tensor of either model", 3.0 * 4 * max(pair.size.largest, pair.size.head))
    numbers = len(texts.samples) * (opened.criteria + 1) + task.answers
    held = _held(opened, pair, texts, size, exchanged)
    return Costs(tuple(stages), held, 0.0, passing=8.0 * opened.models * numbers)


def tracing(opened: TraceOpened) -> Costs:
    """The whole of `trace`: at most so many supplies and components."""
    pair, texts, size = _sizes(opened)
    shape, layers = pair.size, pair.size.layers
    batches, targets = texts.batches(size), opened.targets
    # every supply leads by the screen, or is drawn; each strong one's source is measured
    supplies = len(targets) * len(SUPPLIER_KINDS) * 2 * opened.request.suppliers
    sources = len(targets) * len(SUPPLIER_KINDS) * opened.request.suppliers
    depth = sum(target.layer for target in targets) / max(1, len(targets))
    screen, path, effect = Work(), Work(), Work()
    for batch in batches:
        layer = layer_flops(shape, batch)
        screened = Work(forward=(6 * (depth + 1) + 2) * layer * len(targets))
        screen = screen + gradients(shape, [batch], 1) + screened + _changes(pair, depth + 1, layer)
        after = Work(forward=(layers - depth) * layer, head=head_flops(shape, batch))
        path = path + Work(forward=4 * layer) + after
        half = Work(forward=layers / 2 * layer, head=head_flops(shape, batch))
        effect = effect + half * 3 + _changes(pair, 1, layer)
    stages = [
        *_begun(opened, pair, texts, journal=opened.request.out is not None),
        Stage("base and expert on the prompts", _referring(pair, texts, size)),
        Stage("screening suppliers", screen, f"{len(targets)} targets"),
        Stage("measuring supplies", path * supplies, f"at most {supplies:,} paths"),
        Stage(
            "measuring components",
            effect * (len(targets) + sources),
            f"at most {len(targets) + sources:,}",
        ),
    ]
    kept = memory.graph(shape, max(batches, key=lambda b: b.tokens), _width(opened), layers=layers)
    held = _held(opened, pair, texts, size, Held("activations for gradients", kept))
    notes = ("trace measures fewer components where few supplies are strong",)
    return Costs(tuple(stages), held, 1e6, notes=notes)


def anchoring(opened: AnchorOpened) -> Costs:
    """The whole of `anchor`."""
    pair, texts, size = _sizes(opened)
    shape, batches = pair.size, texts.batches(size)
    alone = forward(shape, texts.alone().batches(size), head=False)
    steered = forward(shape, batches) * 1.5  # the layers after it run again
    stages = [
        *_begun(opened, pair, texts, journal=False),
        Stage("base and expert on the prompts", _referring(pair, texts, size) + alone * 3),
        Stage("layers", steered * shape.layers, f"{shape.layers} layers"),
    ]
    state = Held(
        "states of every layer", 4.0 * 3 * len(texts.samples) * shape.layers * shape.hidden
    )
    return Costs(tuple(stages), _held(opened, pair, texts, size, state), 0.0)


def _sizes(opened: Opened) -> tuple[PairSize, Texts, int]:
    [run] = opened.runs
    texts = Texts.of(run)
    return PairSize.of(run.pair), texts, run.batch_size(texts.samples)


def _width(opened: Opened) -> int:
    return DTYPES[opened.request.dtype].itemsize


def _referring(pair: PairSize, texts: Texts, size: int) -> Work:
    return referring(pair, texts, size, pair.base + pair.expert)


def _changes(pair: PairSize, layers: float, layer: float) -> Work:
    """What all components of some layers change, by weights and by activations."""
    read = pair.expert / pair.size.parameters * pair.size.layer * layers
    return Work(forward=4 * layer * layers, read=2 * read)


def _begun(opened: Opened, pair: PairSize, texts: Texts, *, journal: bool) -> list[Stage]:
    return [
        Stage("opening and comparing", opening(pair), done=True),
        *hashing(pair, journal),
        *asking(pair, texts, opened.request.batch_size),
    ]


def _held(
    opened: Opened, pair: PairSize, texts: Texts, size: int, besides: Held
) -> tuple[Held, ...]:
    width, batches = _width(opened), texts.batches(size)
    wordiest = max(batches, key=lambda batch: batch.positions)
    widest = max(batches, key=lambda batch: batch.tokens)
    reading = Held("logits", memory.logits(pair.size, wordiest))
    held = [memory.model(pair.size, width), memory.teachers(pair.size, [texts])]
    passing = memory.recordings(pair.size, [widest], width)
    return fullest([*held, besides, passing], [*held, reading, passing])
