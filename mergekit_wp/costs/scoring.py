"""What scoring one expert takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_wp.costs import memory
from mergekit_wp.costs.model_size import PairSize
from mergekit_wp.costs.passes import (
    DELTA,
    TextBatch,
    Texts,
    answers,
    attended,
    contributions,
    forward,
    gradients,
    head_flops,
    layer_flops,
    opening,
)
from mergekit_wp.costs.work import NOTHING, Costs, Held, Stage, Work, fullest, total
from mergekit_wp.engine.gradients import PROBES_AT_ONCE
from mergekit_wp.models.memory import free_memory
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import Run
from mergekit_wp.runs.texts import Footprint
from mergekit_wp.scoring.blocks import flat, second_order
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import ScoreOpened
from mergekit_wp.terms import (
    SLICED_KINDS,
    Estimand,
    FineKind,
    Kind,
    of_activations,
    of_knockout,
)


def batch_size(run: Run, texts: Texts) -> int:
    """Sequences a forward pass, as `score` will take them."""
    size = run.batch_size(texts.samples)
    if run.request.batch_size is None:
        footprint = Footprint.of(run.pair, DTYPES[run.request.dtype])
        size = min(size, footprint.fits(texts.samples, free_memory(run.request.device)))
    return size


def asking(pair: PairSize, texts: Texts, at_once: int | None, who: str = "expert") -> list[Stage]:
    """A model's own answers, the expert's or the base's, where prompts have none."""
    if not texts.asked:
        return []
    work = answers(pair.size, texts.asked, texts.answer, min(at_once or 32, len(texts.asked)))
    return [Stage(f"{who} answers", work, f"{len(texts.asked)} answers of at most {texts.answer}")]


def referring(pair: PairSize, texts: Texts, size: int, reads: float) -> Work:
    """Base and expert on the prompts: the expert's distribution, and values of both.

    Args:
        pair: the models.
        texts: the prompts.
        size: sequences at once.
        reads: bytes of weights that are read.
    """
    return forward(pair.size, texts.batches(size)) * 3 + Work(read=reads, passed=reads / 4)


@dataclass(frozen=True)
class Sweep:
    """The sweeps of one request over packed and over padded batches."""

    opened: ScoreOpened
    pair: PairSize
    texts: Texts
    size: int

    @property
    def request(self) -> ScoreRequest:
        """What is asked for."""
        return self.opened.request

    @property
    def run(self) -> Run:
        """The models and prompts."""
        return self.opened.runs[0]

    def stages(self) -> Iterator[Stage]:
        """Every sweep, as `Sweeps.all` takes them."""
        request, criteria = self.request, len(self.opened.criteria)
        padded = self.texts.batches(self.size)
        if "share" in request.estimand:
            steps = contributions(self.pair, padded, criteria) * request.share_steps
            read = Work(read=self.pair.base + self.pair.difference, passed=self.pair.changed)
            yield Stage("share", steps + read * request.share_steps)
        swapped = [estimand for estimand in request.estimand if estimand != "share"]
        by_weights = [e for e in swapped if not of_activations(e)] or ["gain"]
        yield Stage("noise floor", self._noise() * len(by_weights))
        for estimand in swapped:
            exact = self._exact_kinds(estimand)
            work = self._moved(estimand) + self._swaps(estimand, exact)
            yield Stage(f"{estimand}, exact", work, f"{self._count(estimand, exact):,} swaps")
            linear = [k for k in SLICED_KINDS if k in request.kinds and k not in exact]
            if linear:
                yield Stage(f"{estimand}, first-order", self._first_order(estimand, linear))
                yield Stage(f"{estimand}, verifying", self._verified(estimand, linear))

    def _moved(self, estimand: Estimand) -> Work:
        """The receiver's weights, which are read when the other one's were there."""
        pair = self.pair
        read = pair.expert if of_knockout(estimand) else pair.base
        return Work(read=read, passed=pair.size.parameters)

    def _noise(self) -> Work:
        """Heads for themselves in two layers, as many copies at once as patches will be."""
        layers, first = self.pair.size.layers, self._packed()[0]
        copies = self._copies(first)
        mlp = Work(forward=2.0 * first.tokens * self.pair.size.mlp)
        where = sorted({0, layers // 2})
        once = forward(self.pair.size, [first])
        return once + total((self._tail(first, layer) + mlp) * copies for layer in where)

    def _copies(self, batch: TextBatch) -> int:
        """Patches in one replay, as `Recordings.copies` says."""
        widest = max(padded.width for padded in self.texts.batches(self.size))
        return max(1, int(self.size * widest // batch.tokens))

    def replayed(self) -> TextBatch:
        """All rows of the largest replay: as many patches at once as the noise floor has."""
        batches = [(batch, self._copies(batch)) for batch in self._packed()]
        return max(
            (TextBatch(n * b.rows, b.width, n * b.positions) for b, n in batches),
            key=lambda batch: batch.positions,
        )

    # --- how many -----------------------------------------------------------------------------

    def _layers(self, estimand: Estimand, kind: Kind) -> list[int]:
        """Layers in which exchanging a kind can change anything."""
        pair = self.run.pair
        every = range(self.pair.size.layers)
        if of_activations(estimand):
            return [layer for layer in every if pair.diverges(layer)]
        return [layer for layer in every if pair.differs(kind, layer)]

    def _depth(self, layer: int) -> float:
        return (self._last - layer + 1) / self.pair.size.layers if self._last >= layer else 0.0

    @property
    def _last(self) -> int:
        """The last layer that matters; of an anchor that is still to be chosen, the last one."""
        if self.opened.criteria == ("anchor",) and self.request.anchor_layer is not None:
            return self.request.anchor_layer
        return self.pair.size.layers - 1

    def _exact_kinds(self, estimand: Estimand) -> list[Kind]:
        dims = self.run.pair.partition.dims

        def affordable(kind: FineKind) -> bool:
            depth = sum(self._depth(layer) for layer in self._layers(estimand, kind))
            return dims.count(kind) * depth <= self.request.exact_budget

        return [k for k in self.request.kinds if k not in SLICED_KINDS or affordable(k)]

    def _by_layer(self, estimand: Estimand, kind: Kind) -> list[int]:
        """Components of a kind to swap, by layer; those outside the layers stand last."""
        run, layers = self.run.pair, self.pair.size.layers
        counts = [0] * (layers + 1)
        if kind == "tensor":
            for name in run.partition.tensor_names:
                layer = run.partition.layouts[name].layer
                if of_activations(estimand) or name in run.changed:
                    counts[layers if layer is None else layer] += 1
            return counts
        each = 1 if kind == "layer" else run.partition.dims.count(kind)
        for layer in self._layers(estimand, kind):
            counts[layer] = each
        return counts

    def _count(self, estimand: Estimand, kinds: Sequence[Kind]) -> int:
        return sum(sum(self._by_layer(estimand, kind)) for kind in kinds)

    # --- what they take -----------------------------------------------------------------------

    def _packed(self) -> list[TextBatch]:
        """Batches as exact swaps see them: what prompts begin with alike is there once."""
        return self.texts.packed(self.size, self.run.pair)

    def _tail(self, batch: TextBatch, layer: int) -> Work:
        """Replaying the layers after one; the last one's MLP runs where a response is predicted."""
        size, after = self.pair.size, self._last - layer
        attention = 2.0 * batch.tokens * size.attention + attended(size, batch)
        whole = attention + 2.0 * batch.tokens * size.mlp
        last = attention + 2.0 * batch.positions * size.mlp
        flops = (after - 1) * whole + last if after > 0 else 0.0
        return Work(forward=flops, head=head_flops(size, batch))

    def _swap(self, batch: TextBatch, layer: int, kind: Kind) -> Work:
        """One swap in a layer, to the end."""
        size = self.pair.size
        attention = 2.0 * batch.tokens * size.attention + attended(size, batch)
        mlp = 2.0 * batch.tokens * size.mlp
        if layer == size.layers:  # an embedding runs everything, the head itself alone
            return self._tail(batch, -1)
        local = {"neuron": 0.0, "head": mlp, "kv_group": mlp}.get(kind, attention + mlp)
        if kind in SLICED_KINDS:
            dims = self.run.pair.partition.dims
            inner = size.inner if kind == "neuron" else size.heads
            count = dims.count(kind)
            local += 4.0 * batch.tokens * size.hidden * inner / count
        return self._tail(batch, layer) + Work(forward=local)

    def _local(
        self, estimand: Estimand, batch: TextBatch, kinds: Sequence[Kind], *, recorded: bool = False
    ) -> float:
        """FLOPs of what a layer's components change in their own blocks.

        Args:
            estimand: what is measured; of activations, the other model's pass is part of its run.
            batch: the prompts.
            kinds: that are exchanged.
            recorded: what the receiver's own weights hand on was kept when it ran.
        """
        size, own = self.pair.size, 0 if recorded else 1
        attention = 2.0 * batch.tokens * size.attention + attended(size, batch)
        mlp = 2.0 * batch.tokens * size.mlp if "neuron" in kinds else 0.0
        if of_activations(estimand):
            keys = attention if "kv_group" in kinds else 0.0
            runs = bool(keys) or (kinds and not recorded)  # keys of single groups need a run
            return keys + (attention + mlp if runs else 0.0)
        # each block by its own weights, and with those that every kind exchanges
        attends = sum(kind in ("head", "kv_group") for kind in kinds)
        return (own + attends) * attention * bool(attends) + (own + 1) * mlp

    def _swaps(self, estimand: Estimand, kinds: Sequence[Kind]) -> Work:
        """Every component of some kinds, one by one."""
        counts = {kind: self._by_layer(estimand, kind) for kind in kinds}
        return self._of_counts(estimand, counts)

    def _of_counts(self, estimand: Estimand, counts: dict[Kind, list[int]]) -> Work:
        size, found = self.pair.size, NOTHING
        batches = self._packed() if any(map(any, counts.values())) else []
        layer_read = self.pair.expert / size.parameters * size.layer
        for batch in batches:
            found = found + forward(size, [batch], head=False)
            found = found + Work(head=head_flops(size, batch))
            if of_activations(estimand):
                found = found + forward(size, [batch], head=False) + Work(read=self.pair.expert)
            for layer in range(size.layers + 1):
                here = {kind: of[layer] for kind, of in counts.items() if of[layer]}
                if not here:
                    continue
                sliced = [kind for kind in here if kind in SLICED_KINDS]
                # of activations, the other model's run has read the layer
                read = 0.0 if of_activations(estimand) and "tensor" not in here else layer_read
                work = Work(forward=self._local(estimand, batch, sliced), read=read)
                for kind, count in here.items():
                    work = work + self._swap(batch, layer, kind) * count
                found = found + work
        return found

    def _first_order(self, estimand: Estimand, kinds: Sequence[FineKind]) -> Work:
        """Gradients of what every block writes, dotted with every component's change."""
        pair, size, padded = self.pair, self.pair.size, self.texts.batches(self.size)
        criteria = self.opened.criteria
        curved, probes = second_order(criteria, estimand, self.request.curvature)
        linear = sum(not flat(estimand, c) for c in criteria)
        groups = (1 if linear else 0) + probes // PROBES_AT_ONCE
        backs = linear + probes
        width = {"head": size.heads, "kv_group": size.heads, "neuron": size.inner}
        changed = {kind: len(self._layers(estimand, kind)) for kind in kinds}
        found = gradients(size, padded, backs)
        for batch in padded:
            neurons = [kind for kind in kinds if kind == "neuron"]
            attends = [kind for kind in kinds if kind != "neuron"]
            local = sum(
                self._local(estimand, batch, some, recorded=True)
                * max(changed[kind] for kind in some)
                for some in (neurons, attends)
                if some
            )
            if of_activations(estimand):
                local += layer_flops(size, batch) * max(changed.values())
            dotted = sum(
                4.0 * batch.tokens * size.hidden * width[kind] * changed[kind] for kind in kinds
            )
            read = pair.expert / size.parameters * size.layer * size.layers
            again = Work(forward=local, read=read, passed=DELTA * size.layer * size.layers)
            products = linear + probes * len(curved)
            found = found + again * groups + Work(forward=dotted * products)
        return found

    def _verified(self, estimand: Estimand, kinds: Sequence[FineKind]) -> Work:
        """The leaders and a random sample, wherever they lie: spread over the layers evenly."""
        layers, dims = self.pair.size.layers, self.run.pair.partition.dims
        counts: dict[Kind, list[int]] = {}
        for kind in kinds:
            where = self._layers(estimand, kind)
            every = len(where) * dims.count(kind)
            many = min(every, self.request.verify * (1 + len(self.opened.criteria)))
            each, more = divmod(many, max(1, len(where)))
            counts[kind] = [0] * (layers + 1)
            for place, layer in enumerate(where):
                counts[kind][layer] = each + (
                    place * more // len(where) != (place + 1) * more // len(where)
                )
        return self._of_counts(estimand, counts)


def scoring(opened: ScoreOpened) -> Costs:
    """The whole command."""
    request, [run] = opened.request, opened.runs
    pair, texts = PairSize.of(run.pair), Texts.of(run)
    size, width = pair.size, DTYPES[request.dtype].itemsize
    together = batch_size(run, texts)
    anchored = "anchor" in opened.criteria
    refer = referring(pair, texts, together, pair.expert + pair.base)
    if anchored:
        alone = forward(size, texts.alone().batches(together), head=False)
        refer = refer + alone * (3 if run.texts.contrasts else 2)
    sweep = Sweep(opened, pair, texts, together)
    stages = [
        Stage("opening and comparing", opening(pair), done=True),
        *hashing(pair, request.out is not None),
        *asking(pair, texts, request.batch_size),
        Stage("base and expert on the prompts", refer),
        *sweep.stages(),
    ]
    held = [memory.model(size, width), memory.teachers(size, [texts])]
    changes = results(opened, pair)
    widest = max(texts.batches(together), key=lambda batch: batch.tokens)
    wordiest = max(texts.batches(together), key=lambda batch: batch.positions)
    record = memory.recordings(size, [widest], width)
    layer = Held("the other model's layer", float(width * size.layer))
    reading = Held("logits", memory.logits(size, wordiest))
    moments = [[*held, record, layer, reading]]
    if "share" in request.estimand or any(k in request.kinds for k in SLICED_KINDS):
        kept = memory.graph(size, widest, width, layers=size.layers)
        moments.append([*held, Held("activations for gradients", kept), reading])
    many, swaps = sweep.replayed(), [*held, record, changes, layer]
    moments.append([*swaps, Held("patched activations", memory.passing(size, many, width))])
    read = width * many.positions * size.vocabulary + reading.size  # values, one patch at a time
    moments.append([*swaps, Held("logits of patches", read)])
    disk = changes.size / len(texts.samples)
    return Costs(tuple(stages), fullest(*moments), disk, passing=changes.size)


def hashing(pair: PairSize, kept: bool) -> list[Stage]:
    """Both models' files, where a run keeps a journal beside its output."""
    if not kept:
        return []
    whole = sum(pair.files)
    return [Stage("hashing weights", Work(read=whole, passed=whole / 4))]


def results(opened: ScoreOpened, pair: PairSize) -> Held:
    """Every component's change on every prompt, in float64."""
    [run] = opened.runs
    partition, n = run.pair.partition, len(run.texts.prompts)
    dims = partition.dims
    each = dims.n_layers * (1 + sum(dims.count(kind) for kind in SLICED_KINDS))
    numbers = (each + len(partition.tensor_names)) * len(opened.request.estimand)
    return Held("results", 8.0 * n * numbers * len(opened.criteria))
