"""What each choice is worth: one row a choice, on the three-expert combination.

``python -m benchmarks.zoo.ablations`` uses the checkpoints and scores of `benchmarks.zoo.bench`
and prints the ablation table of README.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.config import MergeConfiguration
from tqdm import tqdm

from benchmarks.pooled import Pooled
from benchmarks.zoo.bench import (
    N_PROMPTS,
    ROOT,
    alone,
    checkpoints,
    compare,
    competent_seeds,
    fitted,
    weight_patching,
)
from benchmarks.zoo.lab import naive_rows
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import Comparison
from mergekit_wp.comparison.table import interval, signed
from mergekit_wp.files import scorefile

EXPERTS = ("inst", "math", "sort")
REFERENCE = "fit: 128 prompts"
#: gradients need no exact swaps; gain and knockout are exact where the kind is affordable
CRITERIA = ("kl", "logprob", "anchor")


def changed(path: Path, label: str, change: Callable[[torch.Tensor, str], torch.Tensor]) -> Path:
    """A copy of a score file with changed scores."""
    out = path.with_name(f"{path.stem}-{label}.safetensors")
    file = scorefile.read(path)
    scores = {*file.manifest.score_keys(), *file.manifest.finer_shapes}
    tensors = {k: change(t, k) if k in scores else t for k, t in file.tensors.items()}
    scorefile.write(replace(file, tensors=tensors), out)
    return out


def shuffled(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """The same scores, dealt to other components of the kind, or gates to other channels."""
    if key.endswith("/tensor"):
        return tensor
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order].view(tensor.shape)


def random(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """Uniform numbers."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.rand(tensor.shape, generator=generator)


def rows(seed: int) -> dict[str, MergeConfiguration]:
    """Every recipe, by its row's name."""
    folder = checkpoints(seed)
    made: dict[str, MergeConfiguration] = {}

    def by_fit(label: str, gates: Mapping[str, Path], **parameters: Any) -> None:
        files = {e: {"scores": str(gates[e])} for e in EXPERTS}
        made[label] = weight_patching(folder, EXPERTS, files, fusion="path", **parameters)

    def gates(n: int) -> dict[str, Path]:
        out = fitted(folder, seed, EXPERTS, n)
        return {e: out / f"{e}.safetensors" for e in EXPERTS}

    default = gates(N_PROMPTS)
    by_fit(REFERENCE, default)
    for n in (8, 32, 256):
        by_fit(f"fit: {n} prompts", gates(n))
    by_fit("fit: gates averaged over tensors", default, granularity="tensor")
    for label, change in (("shuffled", shuffled), ("random", random)):
        other = {e: changed(path, label, change) for e, path in default.items()}
        by_fit(f"fit: {label} gates", other)

    def by_own(label: str, n: int = N_PROMPTS, **options: Any) -> None:
        parameters = options.pop("parameters", {})
        own = {e: {"scores": str(alone(folder, seed, e, n, **options))} for e in EXPERTS}
        made[label] = weight_patching(folder, EXPERTS, own, **parameters)

    by_own("alone: share/kl, power 0.5")
    for power in (0.0, 0.25, 1.0, 2.0):
        by_own(f"alone: power {power:g}", parameters={"power": power})
    for fusion in ("winner", "gate"):
        by_own(f"alone: fusion {fusion}", parameters={"fusion": fusion})
    by_own("alone: granularity tensor", parameters={"granularity": "tensor"})
    for n in (8, 32, 256):
        by_own(f"alone: {n} prompts", n)
    for steps in (2, 10):
        by_own(f"alone: {steps} share steps", share_steps=steps)
    every = {"estimand": ("share", "gain", "knockout"), "criterion": CRITERIA}
    for estimand in every["estimand"]:
        for criterion in CRITERIA:
            if (estimand, criterion) != ("share", "kl"):
                chosen = {"estimand": estimand, "criterion": criterion}
                by_own(f"alone: {estimand}/{criterion}", 32, parameters=chosen, **every)
    for label, change in (("shuffled", shuffled), ("random", random)):
        own = {e: {"scores": str(changed(alone(folder, seed, e), label, change))} for e in EXPERTS}
        made[f"alone: {label} scores"] = weight_patching(folder, EXPERTS, own)
    return made


def table(found: dict[int, Comparison], naive: dict[int, dict[str, float]]) -> str:
    """Mean over seeds with intervals, and the difference from the default."""
    resampled = {seed: Resampled(c, 1000, seed) for seed, c in found.items()}

    def pooled(name: str) -> Pooled:
        return Pooled.of({s: [(r.value(name), r.draws(name))] for s, r in resampled.items()})

    names = [row.name for row in next(iter(found.values())).rows if row.role == "ours"]
    output = ["| row | mean over seeds, 95% | minus the default |", "|---|---:|---:|"]
    for name in names:
        difference = (
            "" if name == REFERENCE else signed((pooled(name) - pooled(REFERENCE)).t_interval())
        )
        output.append(f"| {name} | {interval(pooled(name).t_interval())} | {difference} |")
    for name in next(iter(naive.values())):
        values = torch.tensor([naive[seed][name] for seed in found]).double()
        one = Pooled(values.numpy(), values[:, None].numpy())
        difference = signed((one - pooled(REFERENCE)).t_interval())
        output.append(f"| {name} | {interval(one.t_interval())} | {difference} |")
    return "\n".join(output)


@click.command(context_settings={"show_default": True})
@click.option("--seeds", help="Training seeds: 2,4,6.  [default: those of the benchmark]")
def main(seeds: str | None) -> None:
    """Fit, score, merge, measure, print."""
    torch.set_num_threads(1)
    ensure_registered()
    os.chdir(ROOT)
    found: dict[int, Comparison] = {}
    naive: dict[int, dict[str, float]] = {}
    chosen = [int(seed) for seed in seeds.split(",")] if seeds else competent_seeds()
    with tqdm(total=len(chosen), unit="seed") as bar:
        for seed in chosen:
            found[seed] = compare(seed, EXPERTS, (), rows(seed), "ablations", bar)
            naive[seed] = naive_rows(seed, found[seed])
            bar.update()
    click.echo(table(found, naive))


if __name__ == "__main__":
    main()
