"""Three random experts together on an accelerator: a step of a fit, and a merge.

    python -m benchmarks.engine.joint_steps --shape llama-3-8b --depth 16 --device cuda --profile
    python -m benchmarks.engine.joint_steps --shape llama-3-8b --rank 16 --device cuda --cache 20GiB
    python -m benchmarks.engine.joint_steps --table

These are the product's own runs; their steps are told apart by its progress. The first step opens
the models, and its FLOPs are counted; those after it are timed. FLOPs and memory are printed beside
what `--dry-run` says.

Base, three experts and their merge of Llama-3-8B's shape are 80 GB in bfloat16, more than the disk
of the machine with the card holds. So there are two ways, each of under ten minutes: whole experts
of 16 layers instead of 32 (all costs but the unembedding's go by layers), which are also merged; or
LoRA adapters at full depth, which are not, for mergekit would first write each one's merge.

`--table` computes what steps of 1B, 8B and 70B models cost as `--dry-run` does; it runs nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from mergekit.options import MergeOptions
from transformers import LlamaConfig

from benchmarks.engine.measure import Counting, profiling, timed
from benchmarks.engine.synthetic import (
    SIZES,
    config_of,
    matmul_throughput,
    prompts,
    write_adapter,
    write_models,
    write_tokenizer,
)
from benchmarks.forecast.paper import CARD, RANK, adapter_of, pair_of
from mergekit_wp import api
from mergekit_wp.architectures import Dims
from mergekit_wp.costs import memory
from mergekit_wp.costs.forecast import counted
from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.costs.passes import TextBatch, mixed, slopes
from mergekit_wp.costs.shown import amount, duration, flops
from mergekit_wp.costs.work import Costs, Held
from mergekit_wp.errors import UserError
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.fit import a_step
from mergekit_wp.joint.merged_model import MergedModel
from mergekit_wp.models.load import skeleton
from mergekit_wp.models.memory import in_gib, peak_memory, peak_on_gpus
from mergekit_wp.models.placement import choose_device, parse_size

EXPERTS = ("east", "north", "west")
#: of steps
STAGE = "fitting gates"
#: part of each prompt's tokens that is the response
_RESPONSE = 8


@dataclass(frozen=True)
class Task:
    """What is run.

    Attributes:
        count: prompts of every behaviour, and of the guard.
        length: tokens of each, with the response.
        steps: that are timed, after one that is not.
        cache: see `MembersRequest`.
        profile: of one more step.
    """

    count: int
    length: int
    steps: int
    cache: str | None = None
    profile: bool = False

    def prompts(self, number: int) -> list[dict[str, Any]]:
        """Of one behaviour or guard."""
        return prompts(self.count, self.length, max(2, self.length // _RESPONSE), number)


class Steps:
    """A progress that counts the first step, times those after it and profiles the last.

    Attributes:
        ends: when each step was done.
        mixes: when each mixing was done, and how long it took.
        peak: most bytes, of GPUs where there are any.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.every = 1 + task.steps + task.profile
        self.here, self.each, self.done = False, 0.0, 0.0
        self.ends: list[float] = []
        self.mixes: list[tuple[float, float]] = []
        self.peak = 0
        self.counting, self.watching = Counting(), ExitStack()
        self.costs: Costs | None = None

    def plan(self, opened: object) -> None:
        """What `--dry-run` would say."""
        self.costs = counted(opened)

    def stage(self, name: str, total: float, unit: str) -> None:
        """Whether it is that of the steps."""
        self.here, self.each = name == STAGE, total / self.every
        if self.here:
            _forget_peaks()
            self.watching.enter_context(self.counting)

    def advance(self, amount: float, *, resumed: bool = False) -> None:
        """Part of a step is done."""
        if not self.here:
            return
        self.done += amount
        if self.done >= self.each * (len(self.ends) + 1):
            self.watching.close()
            self.ends.append(time.perf_counter())
            self.peak = max(self.peak, peak_on_gpus() or peak_memory())
            if self.task.profile and len(self.ends) == self.every - 1:
                self.watching.enter_context(profiling())

    def note(self, text: str) -> None:
        """Where a fit has looked at where it starts, its first step begins."""
        if text.startswith("after 0 steps"):
            self.counting.total = 0
        if "memory" in text or "cache" in text:
            print(f"  {text}", flush=True)

    def mixing(self, model: MergedModel, flat: torch.Tensor) -> None:
        """What `MergedModel.move_to` does, by the clock."""
        _, seconds, _ = timed(lambda: _MOVE_TO(model, flat))
        self.mixes.append((time.perf_counter(), seconds))

    def said(self, throughput: float) -> str:
        """A step in words.

        Args:
            throughput: FLOP/s of a matrix product.
        """
        assert self.costs is not None
        begun, ended = self.ends[0], self.ends[self.task.steps]
        seconds = (ended - begun) / self.task.steps
        mixing = sum(s for at, s in self.mixes if begun < at <= ended) / self.task.steps
        [stage] = [stage for stage in self.costs.stages if stage.name == STAGE]
        computed = stage.work.flops / self.every
        return (
            f"{seconds:.3g} s a step, {mixing:.3g} s of it mixing, "
            f"{flops(self.counting.total)}FLOP (computed {flops(computed)}FLOP), "
            f"{self.counting.total / seconds / throughput:.1%} of the matrix product's throughput, "
            f"peak {in_gib(self.peak)} (computed {in_gib(self.costs.held(on_device=True))})"
        )


_MOVE_TO = MergedModel.move_to


def _forget_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run_steps(experts: dict[str, str], folder: Path, device: str, dtype: str, task: Task) -> Steps:
    """A fit, from the request to its files in ``fit``.

    Args:
        experts: by name.
        folder: with the base.
        device: that computes.
        dtype: of weights and activations.
        task: what is run.
    """
    steps = Steps(task)
    with patch.object(MergedModel, "move_to", lambda *at: steps.mixing(*at)):
        api.fit(
            folder / "base",
            experts,
            prompts={name: task.prompts(number) for number, name in enumerate(experts)},
            guards=[task.prompts(len(experts))],
            out=folder / "fit",
            progress=steps,
            steps=steps.every,
            device=device,
            dtype=dtype,
            cache=task.cache,
        )
    return steps


def merge(folder: Path, device: str) -> str:
    """The merge by the fitted gates, in words."""
    on_gpu = torch.device(device).type == "cuda"
    options = MergeOptions(cuda=on_gpu, write_model_card=False)
    _forget_peaks()
    out = folder / "merged"
    _, seconds, _ = timed(lambda: api.merge(folder / "fit" / RECIPE, out, options))
    names = ("base", *EXPERTS, "merged")
    size = sum(f.stat().st_size for n in names for f in (folder / n).glob("*.safetensors"))
    peak = peak_on_gpus() or peak_memory()
    return (
        f"{seconds:.3g} s, {size / 1e9:.3g} GB read and written, {size / 1e9 / seconds:.3g} GB/s, "
        f"peak {in_gib(peak)}"
    )


def run(
    shape: str, depth: int | None, rank: int, device: str, dtype: str, task: Task, at: Path
) -> None:
    """Measure one shape and print it.

    Args:
        shape: of `SIZES`.
        depth: fewer layers than it has.
        rank: of LoRA adapters; 0 for whole experts.
        device: that computes.
        dtype: of weights and activations, and of the files.
        task: what is run.
        at: an empty folder.

    Raises:
        UserError: it has no room for the models; or see `FitRequest`.
    """
    config, stored = config_of(shape, depth), getattr(torch, dtype)
    check_room(config, stored.itemsize, rank, at)
    throughput = matmul_throughput(device, stored)
    kind = f"LoRA adapters of rank {rank}" if rank else "whole experts"
    print(
        f"{shape}, {config.num_hidden_layers} layers, {len(EXPERTS)} {kind}, {task.count} prompts "
        f"of {task.length} tokens, on {device} ({dtype}): {throughput / 1e12:.3g} TFLOP/s in one "
        "matrix product",
        flush=True,
    )
    write_models(config, device, stored, at, () if rank else EXPERTS)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # batches go by what is free
    write_tokenizer(at / "base")
    base, experts = at / "base", {name: str(at / name) for name in EXPERTS}
    for name in EXPERTS if rank else ():
        write_adapter(config, stored, at / name, rank)
        experts[name] = f"{base}+{at / name}"
    steps, seconds, _ = timed(partial(run_steps, experts, at, device, dtype, task))
    print(f"  fit: {steps.said(throughput)}; {seconds:.3g} s in all", flush=True)
    print(f"  merge: {'not of adapters' if rank else merge(at, device)}", flush=True)


def table(count: int, length: int, throughput: float, reading: float) -> str:
    """Computed cost of one step of three experts on an H100, nothing measured.

    Args:
        count: prompts of every behaviour; a step takes some of them, and of a guard as many.
        length: tokens of each.
        throughput: FLOP/s that products run at.
        reading: bytes a second that come from files to the device.
    """
    some = a_step(count)
    lines = [
        f"Computed, not measured: three experts in bfloat16, prompts of {length} tokens, "
        f"{throughput / 1e12:.0f} TFLOP/s, {reading / 1e9:.3g} GB/s from the files.",
        "",
        f"| shape | experts | one step, {some} prompts of each and of a guard | TFLOP/s "
        "| on the card at most |",
        "|---|---|---|---:|---:|",
    ]
    terms, response = len(EXPERTS) + 1, max(2, length // _RESPONSE)
    batches = [TextBatch(some, length, some * response)] * terms
    for shape in [shape for shape in SIZES if shape != "tiny"]:
        size = size_of(config_of(shape))
        for kind, pair in (("whole", pair_of(size)), (f"rank {RANK}", adapter_of(size))):
            pairs = [pair] * len(EXPERTS)
            kept = memory.kept(size, batches, 2, CARD)
            step = slopes(pairs, batches, kept=kept) + mixed(pairs)
            seconds = step.flops / throughput + step.read / reading
            took = f"{flops(step.flops)}FLOP, {amount(step.read)} read, {duration(seconds)}"
            held = [
                memory.model(size, 2),
                Held("teachers", 4.0 * count * terms * response * size.vocabulary),
                memory.recordings(size, batches, 2, each=1),
                *memory.slopes_at_work(pairs, batches, 2, CARD),
            ]
            speed, peak = step.flops / seconds / 1e12, sum(part.size for part in held)
            lines.append(f"| {shape} | {kind} | {took} | {speed:.0f} | {amount(peak)} |")
    return "\n".join(lines)


def size_of(config: LlamaConfig) -> ModelSize:
    """Of a model that is not made."""
    model = skeleton(config, "of this shape")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return ModelSize.of(Dims.from_config(config), shapes, config)


def check_room(config: LlamaConfig, width: int, rank: int, at: Path) -> None:
    """Refuse a shape that the disk does not hold, before minutes are spent on it.

    Raises:
        UserError: says what to give instead.
    """
    models = 1 if rank else len(EXPERTS) + 2
    needed, free = models * width * size_of(config).parameters, disk_usage(at).free
    if needed > free:
        raise UserError(
            f"base, experts and merge of {config.num_hidden_layers} layers take {amount(needed)}, "
            f"and {at} has {amount(free)} left; give a smaller --depth, or --rank for adapters"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def least(lowest: int) -> Callable[[str], int]:
        def number(given: str) -> int:
            if not given.isdigit() or int(given) < lowest:
                raise argparse.ArgumentTypeError(f"expected a whole number, at least {lowest}")
            return int(given)

        return number

    parser.add_argument("--shape", choices=[*SIZES], default="tiny")
    parser.add_argument("--depth", type=least(1), help="layers, where not all of the shape's")
    parser.add_argument("--rank", type=least(0), default=0, help="experts are LoRAs of this rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--n-prompts", type=least(4), default=32)
    parser.add_argument("--length", type=least(4), default=128)
    parser.add_argument("--steps", type=least(1), default=2, help="timed, after the first")
    parser.add_argument("--cache", metavar="SIZE", help="main memory for weights, as fit has it")
    parser.add_argument("--profile", action="store_true", help="a profile of one more step")
    parser.add_argument("--table", action="store_true", help="compute costs, run nothing")
    parser.add_argument("--throughput", type=float, default=450e12, help="FLOP/s for --table")
    parser.add_argument("--reading", type=float, default=9.5e9, help="bytes/s for --table")
    options = parser.parse_args(arguments)
    if options.table:
        if not (options.throughput > 0 and options.reading > 0):
            parser.error("--throughput and --reading are above 0")
        print(table(options.n_prompts, options.length, options.throughput, options.reading))
        return
    if options.cache is not None and parse_size(options.cache) is None:
        parser.error(f"--cache {options.cache}: expected a size, as in 20GiB")
    task = Task(options.n_prompts, options.length, options.steps, options.cache, options.profile)
    shape, depth, rank = options.shape, options.depth, options.rank
    try:
        device = choose_device(options.device)
        with TemporaryDirectory() as folder:
            run(shape, depth, rank, device, options.dtype, task, Path(folder))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
