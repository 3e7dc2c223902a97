"""Models too large to run here, from the same counts as `--dry-run`. Nothing is measured.

Three experts and one guard, 32 prompts a behaviour of 256 tokens, 64 of them the answer; a fit
takes 8 prompts a step. Weights and activations are bfloat16, criteria float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mergekit_wp.costs import memory
from mergekit_wp.costs.model_size import ModelSize, PairSize
from mergekit_wp.costs.passes import TextBatch, contributions, mixed, slopes
from mergekit_wp.costs.shown import amount, duration, flops
from mergekit_wp.costs.work import Held, Work

EXPERTS, PROMPTS, A_STEP, TOKENS, ANSWER = 3, 32, 8, 256, 64
#: steps of a fit, and of the share integral
STEPS, SHARE = 200, 5
#: of one H100: products of bfloat16 a second, the part of them that is reached, and bytes it holds
PRODUCTS, REACHED, CARD = 989e12, 0.3, 80e9
#: part of it that may be taken beside weights
ROOM = 0.9
#: of an adapter
RANK = 16
#: a node: cards, bytes of main memory, bytes a second from there to the cards, and from its disk
CARDS, MAIN, BUS, DISK = 8, 2e12, 50e9, 5e9


def dense(layers: int, hidden: int, inner: int, heads: int, keys: int, words: int) -> ModelSize:
    """A model of Llama's shape; widths of all heads and of all keys."""
    attention, mlp = hidden * (2 * heads + 2 * keys), 3 * hidden * inner
    layer = attention + mlp + 2 * hidden
    whole = layers * layer + 2 * words * hidden + hidden
    return ModelSize(
        layers, hidden, heads, attention, mlp, layer, hidden * inner, inner, words, whole, False
    )


def mixture(
    layers: int, hidden: int, inner: int, heads: int, keys: int, words: int, experts: int, to: int
) -> ModelSize:
    """The same with experts, to some of which every token goes; Qwen3's shape."""
    attention, each = hidden * (2 * heads + 2 * keys), 3 * hidden * inner
    layer = attention + experts * each + hidden * experts + 2 * hidden
    whole = layers * layer + 2 * words * hidden + hidden
    largest = experts * 2 * hidden * inner
    mlp = to * each + hidden * experts
    return ModelSize(
        layers, hidden, heads, attention, mlp, layer, largest, to * inner, words, whole, False
    )


MODELS = {
    "Llama 3 70B": dense(80, 8192, 28_672, 8192, 1024, 128_256),
    "Llama 3 405B": dense(126, 16_384, 53_248, 16_384, 1024, 128_256),
    "Qwen3 235B-A22B": mixture(94, 4096, 1536, 8192, 512, 151_936, 128, 8),
}


@dataclass(frozen=True)
class Job:
    """One command on paper.

    Attributes:
        name: of it.
        at_once: prompts of a behaviour that go through together: as many as fit.
        steps: that follow one another.
        step: work of one.
        parts: of a step that are done side by side.
        checkpoints: bytes of the base and whatever experts are whole models.
        memory: of a worker, by what for; the weights first.
    """

    name: str
    at_once: int
    steps: int
    step: Work
    parts: int
    checkpoints: float
    memory: Sequence[Held]

    @property
    def besides(self) -> float:
        """Bytes on the card beside the weights, which can be fetched."""
        return sum(part.size for part in self.memory[1:])


def pair_of(size: ModelSize) -> PairSize:
    """A base and a fully fine-tuned expert, in bfloat16."""
    whole = 2.0 * size.parameters
    products = size.layers * size.active
    return PairSize(
        size,
        base=whole,
        expert=whole,
        files=(whole, whole),
        changed=size.parameters,
        difference=2 * whole,
        matrices=products,
        factored=0.0,
        factors=0.0,
        streamed=2 * whole,
        head=True,
        entrance=True,
    )


def adapter_of(size: ModelSize) -> PairSize:
    """A base and its LoRA adapter of all matrices, of keys and values as wide as queries."""
    widths = 4 * (size.hidden + size.heads) + 3 * (size.hidden + size.inner)
    pair = pair_of(size)
    return replace(
        pair,
        changed=pair.matrices,
        factored=pair.matrices,
        factors=float(RANK * size.layers * widths),
        streamed=0.0,
        head=False,
        entrance=False,
    )


def alone(size: ModelSize, at_once: int) -> Job:
    """Shares of one expert: all midpoints and batches can be done side by side."""
    pair, batch = pair_of(size), TextBatch(at_once, TOKENS, at_once * ANSWER)
    step = contributions(pair, [batch], 1) + Work(read=pair.base + pair.difference)
    kept = Held("activations", memory.graph(size, batch, 2, layers=size.layers))
    logits = Held("logits", memory.logits(size, batch))
    count = SHARE * PROMPTS // at_once
    held = [memory.model(size, 2), kept, logits]
    return Job("score, share", at_once, 1, step * count, count, pair.base + pair.expert, held)


def together(pair: PairSize, name: str, at_once: int) -> Job:
    """One step of every behaviour and guard, each by a worker of its own, and then the next."""
    size, pairs, terms = pair.size, [pair] * EXPERTS, EXPERTS + 1
    whole = [TextBatch(A_STEP, TOKENS, A_STEP * ANSWER)] * terms
    some = [TextBatch(at_once, TOKENS, at_once * ANSWER)]
    held = [
        memory.model(size, 2),
        Held("teachers", 4.0 * terms * PROMPTS * ANSWER * size.vocabulary),
        memory.recordings(size, some, 2, each=1),
        *memory.slopes_at_work(pairs, some, 2, free=0.0),
    ]
    step = slopes(pairs, whole, A_STEP // at_once) + mixed(pairs)
    checkpoints = pair.base + (0.0 if pair.factored else EXPERTS * pair.expert)
    return Job(name, at_once, STEPS, step, terms, checkpoints, held)


def fitting(make: Callable[[int], Job], prompts: int) -> Job:
    """With as many prompts at once as a card has room for, at least one."""
    while prompts > 1 and make(prompts).besides > ROOM * CARD:
        prompts //= 2
    return make(prompts)


def jobs(size: ModelSize) -> list[Job]:
    """Scoring alone, and a fit."""
    whole = pair_of(size)
    found = [
        fitting(partial(alone, size), PROMPTS),
        fitting(partial(together, whole, "fit"), A_STEP),
    ]
    if size.layer == size.active + 2 * size.hidden:  # matrices, not stacks of experts
        make = partial(together, adapter_of(size), "fit of LoRA adapters")
        found.append(fitting(make, A_STEP))
    return found


def times(size: ModelSize, job: Job, cards: int) -> dict[str, float]:
    """Seconds of a step, by what bounds it: products, weights fetched, checkpoints read.

    Every worker computes on one card and reads all that it needs itself; workers of one node share
    its bus and its disk.
    """
    workers = min(cards, job.parts)
    a_node = -(-workers // (cards // CARDS))
    weights = 2.0 * size.parameters
    beyond = max(0.0, weights - max(0.0, CARD - job.besides))
    speed = BUS if job.checkpoints <= MAIN else DISK
    # a step's parts are split among workers; terms are read for by each, batches by one of them
    read = job.step.read * (1 / workers if job.steps == 1 else 1.0)
    turns = job.parts / workers if job.steps == 1 else A_STEP // min(A_STEP, job.at_once)
    return {
        "products": job.step.flops / workers / (PRODUCTS * REACHED),
        "fetching weights": 3 * beyond * turns * a_node / BUS,
        "reading": read * a_node / speed,
    }


def row(name: str, job: Job, size: ModelSize) -> str:
    """One line of the table."""
    whole = []
    for cards in (8, 64):
        found = times(size, job, cards)
        first = max(found, key=lambda what: found[what])
        whole.append(f"{duration(sum(found.values()) * job.steps)}, {first}")
    cells = [
        *(name, job.name, str(job.at_once), f"{job.steps} x {flops(job.step.flops)}FLOP"),
        *(f"{job.steps} x {amount(job.step.read)}", amount(job.besides), *whole),
    ]
    return f"| {' | '.join(cells)} |"


def paper() -> str:
    """The table, and what is held."""
    columns = [
        *("model", "command", "prompts at once", "FLOPs", "read", "on the card beside weights"),
        *("8 H100, most of it", "64 H100, most of it"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|---:|---|---|"]
    lines += [row(name, job, size) for name, size in MODELS.items() for job in jobs(size)]
    lines += ["", "| model | held by a worker of a fit |", "|---|---|"]
    for name, size in MODELS.items():
        parts = ", ".join(
            f"{part.name} {amount(part.size)}" for part in jobs(size)[1].memory if part.size
        )
        lines.append(f"| {name} | {parts} |")
    return "\n".join(lines)
