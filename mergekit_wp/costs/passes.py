"""What one pass through a model takes, by what it is for: the counts that all commands are made of.

A product of N tokens with a matrix of P numbers is 2 P N FLOPs, and as many again for the gradient
of either side. Attention is counted over whole rows, as kernels are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.costs.model_size import ModelSize, PairSize
from mergekit_wp.costs.work import Work, total
from mergekit_wp.engine.packing import TokenCost, packed
from mergekit_wp.models.pair import Pair
from mergekit_wp.prompts import Sample, batches
from mergekit_wp.prompts.batching import together
from mergekit_wp.runs.run import Run

#: numbers read and written for each that a pass goes through, in units of one simple pass
DELTA, PRODUCT, MIX = 1.0, 2.0, 3.0
#: of attention's FLOPs, those of its gradient: five products where there were two
_BACK = 2.5


@dataclass(frozen=True)
class TextBatch:
    """Texts that go through together.

    Attributes:
        rows: how many, on the mean where it stands for several.
        width: tokens of the longest.
        positions: at which the response is predicted, of all.
    """

    rows: float
    width: float
    positions: float

    @property
    def tokens(self) -> float:
        """With padding."""
        return self.rows * self.width


@dataclass(frozen=True)
class Texts:
    """Prompts with responses, as token ids.

    Attributes:
        samples: with answers that are to come as long as they may be, of nothing but zeros.
        asked: tokens of every prompt whose answer is to come.
        answer: most tokens of one of these.
        side: of a length; see `prompts.batching.batches`.
    """

    samples: tuple[Sample, ...]
    asked: tuple[int, ...]
    answer: int
    side: Callable[[int], Hashable] = lambda _length: None

    @classmethod
    def of(cls, run: Run) -> Texts:
        """Of a run's prompts."""
        texts, answer = run.texts, run.request.max_new_tokens
        unknown = (0,) * answer
        samples = [
            Sample(tuple(prompt), tuple(texts.responses.get(i, unknown)))
            for i, prompt in enumerate(texts.prompts)
        ]
        asked = [len(p) for i, p in enumerate(texts.prompts) if i not in texts.responses]
        side = RopeBorders.of(run.pair.base.config).side
        return cls(tuple(samples), tuple(asked), answer, side)

    def batches(self, size: int) -> list[TextBatch]:
        """As they go through a model, so many at once at most."""
        lengths = [len(sample.input_ids) for sample in self.samples]
        return [
            TextBatch(
                len(members),
                max(lengths[i] for i in members),
                sum(len(self.samples[i].response_ids) for i in members),
            )
            for members in together(lengths, size, self.side)
        ]

    def packed(self, size: int, pair: Pair) -> list[TextBatch]:
        """The same, with what texts begin with alike in one row once; see `engine.packing`.

        Padded where a sliding window is shorter than the longest.
        """
        config, partition = pair.base.text_config, pair.partition
        window = getattr(config, "sliding_window", None)
        longest = max(len(sample.input_ids) for sample in self.samples)
        sliding = getattr(config, "use_sliding_window", True) and window and window < longest
        if sliding or not partition.dims.architecture.mapped:
            return self.batches(size)
        cost = TokenCost.in_layer(partition, int(config.hidden_size))
        found = []
        for batch in batches(self.samples, size, "cpu", self.side):
            rows, width = packed(batch, cost).ids.shape
            found.append(TextBatch(rows, width, len(batch.targets)))
        return found

    def alone(self) -> Texts:
        """The prompts without responses."""
        return replace(self, samples=tuple(Sample(s.prompt_ids) for s in self.samples), asked=())

    @property
    def positions(self) -> int:
        """Tokens of all responses."""
        return sum(len(sample.response_ids) for sample in self.samples)


def attended(size: ModelSize, batch: TextBatch) -> float:
    """FLOPs of one layer's attention, beside its matrices."""
    return 4.0 * batch.tokens * batch.width * size.heads


def layer_flops(size: ModelSize, batch: TextBatch) -> float:
    """FLOPs of one layer on a batch."""
    return 2.0 * batch.tokens * size.active + attended(size, batch)


def head_flops(size: ModelSize, batch: TextBatch) -> float:
    """FLOPs of the unembedding at the positions that predict a response."""
    return 2.0 * batch.positions * size.head


def forward(size: ModelSize, batches: Iterable[TextBatch], *, head: bool = True) -> Work:
    """All layers once, and the unembedding of responses."""
    return total(
        Work(
            forward=size.layers * layer_flops(size, batch),
            head=head_flops(size, batch) if head else 0.0,
        )
        for batch in batches
    )


def _layers_back(size: ModelSize, batch: TextBatch) -> float:
    """FLOPs of the gradients of what enters every layer."""
    return size.layers * (2.0 * batch.tokens * size.active + _BACK * attended(size, batch))


def gradients(
    size: ModelSize, batches: Iterable[TextBatch], criteria: int, *, entrance: bool = False
) -> Work:
    """A run forward, and the gradient of what every block writes by each criterion.

    Args:
        size: of the model.
        batches: what goes through.
        criteria: how many.
        entrance: whether the gradient goes on to what enters the first layer.
    """
    found = []
    for batch in batches:
        first = 2.0 * batch.tokens * size.attention + _BACK * attended(size, batch)
        flops = _layers_back(size, batch) - (0.0 if entrance else first)
        back = Work(backward=flops, head=head_flops(size, batch))
        found.append(forward(size, [batch]) + back * criteria)
    return total(found)


def contributions(pair: PairSize, batches: Iterable[TextBatch], criteria: int) -> Work:
    """A run forward, and by each criterion its gradient times the task vector, by prompt.

    The task vector is read anew for every batch and criterion.
    """
    found = []
    for batch in batches:
        products = Work(
            backward=2.0 * batch.tokens * pair.matrices,
            head=head_flops(pair.size, batch) if pair.head else 0.0,
        )
        back = gradients(pair.size, [batch], criteria, entrance=True)
        found.append(back + (products + differences(pair)) * criteria)
    return total(found)


def differences(pair: PairSize) -> Work:
    """Every difference read once; a tied head's twice, where it is read and where it is written."""
    again = pair.size.head / pair.changed if pair.size.tied and pair.head else 0.0
    return Work(read=pair.difference, passed=DELTA * pair.changed) * (1.0 + again)


def slopes(
    pairs: Sequence[PairSize],
    terms: Sequence[TextBatch],
    parts: int = 1,
    kept: Collection[int] = (),
) -> Work:
    """Layers forward and back, with weight gradients; dotted with every difference.

    Args:
        pairs: the experts; differences are read once for all terms.
        terms: of one step.
        parts: so often they are read, where memory lets fewer prompts through at once.
        kept: numbers of those whose layers do not run forward a second time.
    """
    size, matrices = pairs[0].size, max(pair.matrices - pair.factored for pair in pairs)
    head, factors = any(pair.head for pair in pairs), sum(pair.factors for pair in pairs)
    found = [
        Work(
            forward=(1 if number in kept else 2) * size.layers * layer_flops(size, term),
            backward=_layers_back(size, term) + 2.0 * term.tokens * (matrices + factors),
            head=(3 if head else 2) * head_flops(size, term),
        )
        for number, term in enumerate(terms)
    ]
    for pair in pairs:
        whole = pair.changed - pair.factored
        again = pair.size.head / pair.changed if pair.size.tied and pair.head else 0.0
        read = Work(read=pair.streamed, passed=DELTA * whole) * (1.0 + again)
        found.append((read + Work(passed=PRODUCT * len(terms) * whole)) * parts)
    return total(found)


def mixed(pairs: Sequence[PairSize]) -> Work:
    """The merge at some gates, written from the base and every expert.

    An expert that is an adapter is read with the base.
    """
    whole = [pair for pair in pairs if not pair.factored]
    read = pairs[0].base + sum(p.expert * p.changed / p.size.parameters for p in whole)
    return Work(read=read, passed=pairs[0].size.parameters + MIX * sum(p.changed for p in pairs))


def answers(size: ModelSize, asked: Sequence[int], answer: int, at_once: int) -> Work:
    """Answers token by token, all as long as they may be.

    Args:
        size: of the model.
        asked: tokens of every prompt.
        answer: tokens of each answer.
        at_once: prompts that go through together.
    """
    found = []
    for members in together(asked, at_once, lambda _: None):
        rows, width = len(members), max(asked[i] for i in members)
        prefill = TextBatch(rows, width, rows)
        seen = sum(4.0 * rows * size.heads * (width + n) for n in range(1, answer))
        tokens = rows * max(0, answer - 1)
        token = 2.0 * (size.layers * size.active + size.head)
        found.append(
            forward(size, [prefill])
            + Work(decoding=tokens * token + size.layers * seen, steps=float(max(0, answer - 1)))
        )
    return total(found)


def opening(pair: PairSize) -> Work:
    """Both checkpoints compared, tensor by tensor."""
    return Work(read=pair.base + pair.expert, passed=2 * pair.size.parameters)
