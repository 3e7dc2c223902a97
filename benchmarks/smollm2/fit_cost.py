"""What a fit costs, beside one score run and full fine-tuning, and what larger models would need.

``python -m benchmarks.smollm2.fit_cost`` runs each command as a process of its own, reads its CPU
time and peak memory, counts the FLOPs of one step, and prints the tables of README.md. The experts
come from `benchmarks.smollm2.bench`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.smollm2.bench import local
from benchmarks.smollm2.experts import batch_of
from benchmarks.smollm2.fitting import recipe_of
from benchmarks.smollm2.paths import BASE, BUILD, PROMPTS, REPO, read_jsonl
from benchmarks.smollm2.tasks import SKILLS
from mergekit_wp.criteria import Targets
from mergekit_wp.engine.share import TaskVector
from mergekit_wp.engine.slopes import Term, slopes
from mergekit_wp.engine.trace import Decoder
from mergekit_wp.pair import open_pair
from mergekit_wp.prompts import Sample, batches
from mergekit_wp.resident import ResidentModel
from mergekit_wp.scoring.references import logprobs

A_STEP = 8
#: name, parameters, layers, hidden size, vocabulary
SIZES = (
    ("1B", 1.24e9, 16, 2048, 128_256),
    ("8B", 8.03e9, 32, 4096, 128_256),
    ("70B", 70.6e9, 80, 8192, 128_256),
)
#: three behaviours, 8 prompts a step of 256 tokens, 64 of them the response; 32 prompts in all
BEHAVIOURS, LENGTH, RESPONSE, ALL = 3, 256, 64, 32


def process(arguments: Sequence[str]) -> tuple[float, float]:
    """CPU seconds and peak GiB of one process."""
    child = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def fine_tune(steps: int) -> None:
    """Full fine-tuning in float32 on the same prompts; run as a process of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

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


def fit(out: Path, steps: int, dtype: str) -> list[str]:
    """A fit of all three experts."""
    pairs = [f"{e}={local(PROMPTS / f'{e}.jsonl')}" for e in SKILLS]
    program = str(Path(sys.executable).with_name("mergekit-wp"))
    return [
        *(program, "fit", local(recipe_of(SKILLS)), "--out", str(out / f"{steps}-{dtype}.st")),
        *(part for pair in pairs for part in ("--prompts", pair)),
        *("--steps", str(steps), "--held-out", "0", "--dtype", dtype),
        *("--prompts-a-step", str(A_STEP)),
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
        slopes(decoder, [term], pair.partition, [vector])
    in_layers = sum(
        p.numel() for name, p in resident.model.named_parameters() if ".layers." in name
    )
    return float(counter.total), 8.0 * in_layers * batch.ids.numel()


def needed() -> str:
    """The table of larger models, computed."""
    lines = [
        "| model | weights | residual streams | one layer's gradients | teachers | PFLOP a step |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    tokens = BEHAVIOURS * A_STEP * LENGTH
    for name, parameters, layers, hidden, vocabulary in SIZES:
        sizes = (
            2 * parameters,
            2 * 3 * layers * tokens * hidden,  # both blocks' outputs and the layer's
            4 * 2 * parameters / layers,
            4 * BEHAVIOURS * ALL * RESPONSE * vocabulary,
        )
        cells = [f"{size / 2**30:.1f} GiB" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} | {8 * parameters * tokens / 1e15:.2f} |")
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
        few = {dtype: process(fit(out, 1, dtype)) for dtype in ("bfloat16", "float32")}
        more = {dtype: process(fit(out, 3, dtype)) for dtype in ("bfloat16", "float32")}
        score = process(
            [
                *(program, "score", local(BASE), local(BUILD / "experts" / "math")),
                *("--prompts", local(PROMPTS / "math.jsonl"), "--max-prompts", "12"),
                *("--estimand", "share", "--criterion", "kl", "--out", str(out / "s.safetensors")),
            ]
        )
    tuning, again = process([*python, "1"]), process([*python, "3"])
    step = (again[0] - tuning[0]) / 2
    click.echo("| | CPU time of a step, x full fine-tuning (float32) | peak memory, x |")
    click.echo("|---|---:|---:|")
    for dtype, (cpu, peak) in more.items():
        per_step = (cpu - few[dtype][0]) / 2
        click.echo(f"| fit, {dtype} | {per_step / step:.2f} | {peak / again[1]:.2f} |")
        whole = few[dtype][0] + 15 * per_step
        click.echo(
            f"| 16 steps of it, x one score run of one expert | {whole / score[0]:.1f} | "
            f"{peak / score[1]:.2f} |"
        )
    counted, predicted = flops()
    click.echo(f"\nFLOPs of a slope: {counted / predicted:.2f} times 8 P N of the layers\n")
    click.echo(needed())


if __name__ == "__main__":
    main()
