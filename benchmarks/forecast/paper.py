"""Models that are too large to run here, from the same counts as `--dry-run`. Nothing is measured.

Three experts and one guard, 32 prompts a behaviour of 256 tokens, 64 of them the answer; a fit takes
8 prompts a step. Weights and activations are bfloat16, criteria float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_wp.costs import memory
from mergekit_wp.costs.model_size import ModelSize, PairSize
from mergekit_wp.costs.passes import TextBatch, contributions, mixed, slopes
from mergekit_wp.costs.shown import amount, duration, flops
from mergekit_wp.costs.work import Held, Work

EXPERTS, PROMPTS, A_STEP, TOKENS, ANSWER = 3, 32, 8, 256, 64
#: steps of the path in company, of a fit, and of the share integral
PATH, STEPS, SHARE = 10, 200, 5
#: of one H100: products of bfloat16 a second, the part of them that is reached, and bytes it holds
PRODUCTS, REACHED, CARD = 989e12, 0.3, 80e9
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
        steps: that follow one another.
        step: work of one.
        parts: that can be done side by side in a step.
        memory: of a worker, by what for; the weights first.
    """

    name: str
    steps: int
    step: Work
    parts: int
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
        size, whole, whole, (whole, whole), size.parameters, 2 * whole, products, True, True
    )


def jobs(size: ModelSize) -> list[Job]:
    """Scoring alone and in company, and a fit."""
    pairs = [pair_of(size)] * EXPERTS
    batch = TextBatch(PROMPTS, TOKENS, PROMPTS * ANSWER)
    term = TextBatch(A_STEP, TOKENS, A_STEP * ANSWER)
    model = memory.model(size, 2)
    teachers = Held("teachers", 4.0 * EXPERTS * PROMPTS * ANSWER * size.vocabulary)
    share = contributions(pairs[0], [batch], 1) + Work(read=2 * pairs[0].base)
    kept = Held("activations", memory.graph(size, batch, 2, layers=size.layers))
    company, fit = [batch] * EXPERTS, [term] * (EXPERTS + 1)

    def held(terms: Sequence[TextBatch]) -> list[Held]:
        record = memory.recordings(size, terms, 2)
        return [model, teachers, record, *memory.slopes_at_work(pairs, terms, 2)]

    return [
        Job("score, share", SHARE, share, 1, [model, kept]),
        Job("score together", PATH, slopes(pairs, company) + mixed(pairs), EXPERTS, held(company)),
        Job("fit", STEPS, slopes(pairs, fit) + mixed(pairs), EXPERTS + 1, held(fit)),
    ]


def times(size: ModelSize, job: Job, cards: int) -> dict[str, float]:
    """Seconds of a step, by what bounds it: products, weights fetched, checkpoints read.

    Every worker computes on one card and reads all checkpoints itself; workers of one node share
    its bus and its disk. A share integral's steps are done side by side instead of its parts.
    """
    side_by_side = job.steps if job.parts == 1 else job.parts
    workers = min(cards, side_by_side)
    a_node = -(-workers // (cards // CARDS))
    share = job.step.flops / (workers if job.parts > 1 else 1)
    weights = 2.0 * size.parameters
    beyond = max(0.0, weights - max(0.0, CARD - job.besides))
    all_checkpoints = (EXPERTS + 1) * weights
    speed = BUS if all_checkpoints <= MAIN else DISK
    return {
        "products": share / (PRODUCTS * REACHED),
        "weights fetched to the card": 3 * beyond * a_node / BUS,
        "checkpoints read": job.step.read * a_node / speed,
    }


def row(name: str, job: Job, size: ModelSize) -> str:
    """One line of the table."""
    whole = []
    for cards in (8, 64):
        found = times(size, job, cards)
        turns = -(-job.steps // min(cards, job.steps)) if job.parts == 1 else job.steps
        first = max(found, key=lambda what: found[what])
        if job.besides > CARD:
            first = "does not fit: fewer prompts at once"
        whole.append(f"{duration(sum(found.values()) * turns)} ({first})")
    cells = [
        *(name, job.name, f"{job.steps} x {flops(job.step.flops)}FLOP"),
        *(f"{job.steps} x {amount(job.step.read)}", amount(job.besides), *whole),
    ]
    return f"| {' | '.join(cells)} |"


def paper() -> str:
    """The table, and what is held."""
    lines = [
        "| model | command | steps | read by a worker | on its card beside weights | 8 H100 | 64 H100 |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [row(name, job, size) for name, size in MODELS.items() for job in jobs(size)]
    lines += ["", "| model | held by a worker of a fit |", "|---|---|"]
    for name, size in MODELS.items():
        parts = ", ".join(f"{part.name} {amount(part.size)}" for part in jobs(size)[-1].memory)
        lines.append(f"| {name} | {parts} |")
    return "\n".join(lines)
