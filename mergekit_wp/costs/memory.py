"""What is held in memory while a command runs, by what for.

Bytes that follow from shapes. What an allocator keeps for itself beside them is measured
(benchmarks/forecast), and counted as a part of what comes and goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergekit_wp.costs.model_size import ModelSize, PairSize
from mergekit_wp.costs.passes import TextBatch, Texts
from mergekit_wp.costs.work import Held
from mergekit_wp.joint.merged_model import fitting
from mergekit_wp.runs.texts import Footprint

#: logits of the hungriest pass, in copies of float32: logits, log-probabilities, their gradients
LOGITS = 5
#: the teachers' numbers are float32
_FLOAT = 4


def model(size: ModelSize, width: int) -> Held:
    """The weights that are run, so many bytes each."""
    return Held("model", float(size.parameters * width))


def teachers(size: ModelSize, texts: Iterable[Texts]) -> Held:
    """Log-probabilities of the teachers at every position of every response."""
    positions = sum(own.positions for own in texts)
    return Held("teachers' log-probabilities", float(_FLOAT * positions * size.vocabulary))


def recordings(size: ModelSize, batches: Sequence[TextBatch], width: int, each: int = 3) -> Held:
    """What both blocks of every layer and the layer itself return, for some batches at once.

    Only the layer itself where ``each`` is 1.
    """
    tokens = sum(batch.tokens for batch in batches)
    return Held("recordings", float(each * size.layers * tokens * size.hidden * width))


def graph(size: ModelSize, batch: TextBatch, width: int, *, layers: int) -> float:
    """Bytes that autograd keeps of some layers; see `Footprint`."""
    per_token = Footprint.per_layer(size.hidden, size.inner, width)
    return float(layers * batch.tokens * per_token)


def passing(size: ModelSize, batch: TextBatch, width: int) -> float:
    """Bytes that one layer takes without gradients: its input, what it writes, its neurons."""
    return float(batch.tokens * width * (6 * size.hidden + 3 * size.inner))


def logits(size: ModelSize, batch: TextBatch, copies: int = LOGITS) -> float:
    """Bytes of logits and what is made of them, at all positions of a batch."""
    return float(copies * _FLOAT * batch.positions * size.vocabulary)


def kept(size: ModelSize, terms: Sequence[TextBatch], width: int, free: float) -> list[int]:
    """Numbers of the terms whose activations `MergedModel` keeps, of so much free memory."""
    sizes = [graph(size, term, width, layers=size.layers) for term in terms]
    return fitting(sizes, free - model(size, width).size)


def slopes_at_work(
    pairs: Sequence[PairSize], terms: Sequence[TextBatch], width: int, free: float
) -> tuple[Held, ...]:
    """The fuller of two moments: the layers' gradients by term, or the unembedding's.

    Weight gradients of every term are kept apart until they are dotted with the differences.
    """
    size, one = pairs[0].size, max(terms, key=lambda term: term.tokens)
    whole = any(pair.matrices > pair.factored for pair in pairs)
    of_kept = [terms[number] for number in kept(size, terms, width, free)]
    activations = sum(graph(size, term, width, layers=size.layers) for term in of_kept)
    gradients = float(_FLOAT * len(terms) * size.layer) if whole else 0.0
    in_layer = (
        Held("gradients of a layer by behaviour", gradients),
        Held("activations", max(activations, graph(size, one, width, layers=1))),
        Held("difference of a tensor", float(3 * _FLOAT * size.largest) if whole else 0.0),
        Held("factors of adapters", float(_FLOAT * sum(pair.factors for pair in pairs))),
    )
    moved = any(pair.head for pair in pairs)
    wordiest = max(terms, key=lambda term: term.positions)
    # gradients by behaviour, those that flow back, and a difference with its products
    at_head = (
        Held("gradients of the unembedding by behaviour", float(_FLOAT * len(terms) * size.head)),
        Held("difference of the unembedding", float(3 * _FLOAT * size.head)),
    )
    reading = Held("logits", logits(size, wordiest)), Held("activations", activations)
    moments = [in_layer, (*(at_head if moved else ()), *reading)]
    return max(moments, key=lambda parts: sum(part.size for part in parts))
