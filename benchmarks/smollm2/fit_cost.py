"""What a fit costs, beside one score run and full fine-tuning, and what larger models would need.

``python -m benchmarks.smollm2.fit_cost`` runs each command as a process of its own, reads its CPU
time and peak memory (beside what the memory model below says), counts the FLOPs of one step, and
prints the tables of README.md and docs/fit.md. The experts come from `benchmarks.smollm2.bench`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import REPO, local, read_jsonl
from benchmarks.fit_table import FitTable
from benchmarks.smollm2.paths import BASE, BUILD, PROMPTS, SMOLLM2
from benchmarks.smollm2.tasks import SKILLS
from benchmarks.training import batch_of
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.decoder import Decoder
from mergekit_wp.engine.integrated_gradients import TaskVector
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample, batches, read_prompts
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.runs.references import logprobs
from mergekit_wp.runs.texts import encode_texts

#: of a fit, in the table
A_STEP, STEPS = 8, 20


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    tied: bool

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.inner)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, or of the unembedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, without norms."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one step over all behaviours, and response positions of all."""

    tokens: int
    longest: int
    responses: int
    all_responses: int


OURS = Size(30, 576, 1536, 192, 49_152, tied=True)
#: Llama-3.2-1B, Llama-3-8B and Llama-3-70B
SIZES = {
    "1B": Size(16, 2048, 8192, 512, 128_256, tied=True),
    "8B": Size(32, 4096, 14_336, 1024, 128_256, tied=False),
    "70B": Size(80, 8192, 28_672, 1024, 128_256, tied=False),
}
#: three behaviours, 8 prompts a step of 256 tokens, 64 of them the response; 32 prompts in all
STATED = Prompts(3 * A_STEP * 256, A_STEP * 256, A_STEP * 64, 3 * 32 * 64)


def memory(size: Size, prompts: Prompts, width: int) -> tuple[float, float, float, float]:
    """Bytes a fit needs, by what for; `width` bytes a weight, float32 for the rest.

    Returns:
        Of the weights; of the residual streams (both blocks' outputs and the layer's); of the stage
        at work (the layers', or the unembedding's, whichever is larger: the weight gradients of
        every term of the step, and a task vector; logits and their gradients); and of the teachers'
        log-probabilities.
    """
    inside, terms = 12 * size.hidden + 4 * size.inner, len(SKILLS)
    layer = 4 * (terms + 1) * size.layer + width * prompts.longest * inside
    head = 4 * (terms + 1) * size.embedding + 5 * 4 * prompts.responses * size.vocabulary
    return (
        width * size.parameters,
        width * 3 * size.layers * prompts.tokens * size.hidden,
        max(layer, head),
        4 * prompts.all_responses * size.vocabulary,
    )


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a process, its peak GiB, and those without mapped files."""

    cpu: float
    peak: float
    own: float


def process(arguments: Sequence[str]) -> Cost:
    """Run one to its end."""
    child = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.DEVNULL)
    watched, own = psutil.Process(child.pid), 0
    while True:
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            break
        held = watched.memory_info()
        own = max(own, held.rss - held.shared)
        time.sleep(0.005)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, own / 2**30)


def fine_tune(steps: int) -> None:
    """Full fine-tuning in float32 on the same prompts; run as a process of its own."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(steps):
        for skill in SKILLS:
            rows = read_jsonl(PROMPTS / f"{skill}.jsonl")[step * A_STEP : (step + 1) * A_STEP]
            batch = batch_of(tokenizer, rows)
            hidden = model.model(input_ids=batch["ids"]).last_hidden_state
            logits = model.lm_head(hidden[batch["at"][:, 0], batch["at"][:, 1]])
            torch.nn.functional.cross_entropy(logits, batch["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def fit(out: Path, steps: int) -> list[str]:
    """A fit of all three experts."""
    pairs = [f"{e}={local(PROMPTS / f'{e}.jsonl')}" for e in SKILLS]
    program = str(Path(sys.executable).with_name("mergekit-wp"))
    return [
        *(
            program,
            "fit",
            local(FitTable(SMOLLM2).recipe(SKILLS)),
            "--out",
            str(out / f"fitted-{steps}"),
        ),
        *(part for pair in pairs for part in ("--prompts", pair)),
        *("--steps", str(steps), "--held-out", "0", "--unguarded", "--prompts-a-step", str(A_STEP)),
    ]


class Counted(TorchDispatchMode):
    """FLOPs of all products; torch's own counter hooks modules, which autograd.grad refuses."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


def flops() -> tuple[float, float]:
    """FLOPs of one slope of one expert and eight texts, and 8 P N: parameters times tokens."""
    pair = open_pair(str(BASE), str(BUILD / "experts" / "math"), lambda *_: None)
    resident = ResidentModel(pair, torch.float32, "cpu")
    resident.move_to(1.0)
    decoder = Decoder(resident.model)
    sample = Sample(tuple(range(100, 148)), tuple(range(200, 216)))
    [batch] = batches([sample] * A_STEP, A_STEP, "cpu")
    term = Term(batch, Targets(logprobs(decoder, batch)), 1.0)
    vector = TaskVector(lambda name: pair.delta(name, torch.float32, "cpu"), pair.changed)
    with Counted() as counter:
        slopes(decoder, [term], pair.partition.layouts, [vector])
    in_layers = sum(
        p.numel() for name, p in resident.model.named_parameters() if ".layers." in name
    )
    return float(counter.total), 8.0 * in_layers * batch.ids.numel()


def fitted_on() -> Prompts:
    """What the fits here are given: the longest step over all behaviours."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    steps, every = [], 0
    for skill in SKILLS:
        path = PROMPTS / f"{skill}.jsonl"
        texts = encode_texts(tokenizer, read_prompts(path, None), NoProgress())
        pairs = zip(texts.prompts, texts.responses.values(), strict=True)
        samples = [Sample(tuple(prompt), tuple(response)) for prompt, response in pairs]
        found = list(batches(samples, A_STEP, "cpu"))
        steps.append([(b.ids.numel(), len(b.rows)) for b in found])
        every += sum(len(b.rows) for b in found)
    tokens = [max(n for n, _ in of_skill) for of_skill in steps]
    responses = max(r for of_skill in steps for _, r in of_skill)
    return Prompts(sum(tokens), max(tokens), responses, every)


def needed() -> str:
    """The table of larger models, computed."""
    lines = ["| model | weights | residual streams | stage at work | teachers | PFLOP a step |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, size in SIZES.items():
        cells = [f"{part / 2**30:.1f} GiB" for part in memory(size, STATED, 2)]
        work = 8 * size.parameters * STATED.tokens / 1e15
        lines.append(f"| {name} | {' | '.join(cells)} | {work:.2f} |")
    return "\n".join(lines)


@click.command()
@click.option("--fine-tune", "tuned", type=int, help="Internal: only so many steps of tuning.")
def main(tuned: int | None) -> None:
    """Measure, count, print."""
    if tuned is not None:
        fine_tune(tuned)
        return
    python = [sys.executable, "-m", "benchmarks.smollm2.fit_cost", "--fine-tune"]
    program = str(Path(sys.executable).with_name("mergekit-wp"))
    with TemporaryDirectory(dir=BUILD) as folder:
        out = Path(folder)
        few, more = process(fit(out, 1)), process(fit(out, 3))
        score = process(
            [
                *(program, "score", local(BASE), local(BUILD / "experts" / "math")),
                *("--prompts", local(PROMPTS / "math.jsonl"), "--max-prompts", "12"),
                *("--estimand", "share", "--criterion", "kl", "--out", str(out / "s.safetensors")),
            ]
        )
    tuning, again, idle = process([*python, "1"]), process([*python, "3"]), process([*python, "0"])
    step, ours = (again.cpu - tuning.cpu) / 2, (more.cpu - few.cpu) / 2
    click.echo("| a fit of three experts, float32 | CPU time | peak memory |")
    click.echo("|---|---:|---:|")
    click.echo(
        f"| one step, x one of full fine-tuning (AdamW) | {ours / step:.2f} | "
        f"{more.peak / again.peak:.2f} |"
    )
    click.echo(
        f"| {STEPS} steps, x one score run of one expert (share, 12 prompts) | "
        f"{(few.cpu + (STEPS - 1) * ours) / score.cpu:.1f} | {more.peak / score.peak:.2f} |"
    )
    parts = memory(OURS, fitted_on(), 4)
    own, computed = more.own - idle.own, sum(parts) / 2**30
    told = ", ".join(f"{part / 2**30:.2f}" for part in parts)
    click.echo(
        f"\nmemory without imports and mapped files: {own:.2f} GiB, {own / computed:.2f} "
        f"times the {computed:.2f} GiB computed ({told})"
    )
    counted, predicted = flops()
    click.echo(f"\nFLOPs of a slope: {counted / predicted:.2f} times 8 P N of the layers\n")
    click.echo(needed())


if __name__ == "__main__":
    main()
