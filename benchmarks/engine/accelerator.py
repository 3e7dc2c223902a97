"""Synthetic models on an accelerator: how much of its matrix throughput a sweep reaches.

    python -m benchmarks.engine.accelerator --shape llama-3.2-1b --device cuda --dtype bfloat16
    python -m benchmarks.engine.accelerator --table

Random weights and small deltas: time and FLOPs do not depend on the numbers. Exact heads are timed
in some layers, evenly spaced, and FLOPs are counted there too; first-order everything in full. The
card's throughput is that of one large matrix product in the same run.

`--table` computes what sweeps of 1B, 8B and 70B models cost from FLOPs and bytes; it runs nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.engine.measure import counted, profiling, timed
from benchmarks.engine.synthetic import SIZES, config_of, matmul_throughput, write_models
from mergekit_wp.models.memory import AtOnce, in_gib, peak_memory, peak_on_gpus
from mergekit_wp.models.pair import open_pair
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.runs.references import measure_references
from mergekit_wp.runs.texts import auto_batch_size
from mergekit_wp.scoring.blocks import Block, exact_blocks, first_order_blocks, share_blocks
from mergekit_wp.scoring.measure import measure
from mergekit_wp.terms import SLICED_KINDS, Kind


def samples(count: int, length: int, response: int, vocabulary: int) -> list[Sample]:
    """Random prompts whose first quarter is the same, as under a chat template."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    shared = tokens(length // 4)
    return [
        Sample(shared + tokens(length - response - length // 4), tokens(response))
        for _ in range(count)
    ]


def run(
    shape: str,
    device: str,
    dtype: torch.dtype,
    count: int,
    length: int,
    layers: int,
    profile: bool = False,
) -> None:
    """Measure one shape and print it, with a profile of each sweep if asked."""
    peak = matmul_throughput(device, dtype)
    print(f"{shape} on {device} ({dtype}): {peak / 1e12:.3g} TFLOP/s in one matrix product")
    with tempfile.TemporaryDirectory() as folder:
        config, names = config_of(shape), [str(Path(folder, n)) for n in ("base", "expert")]
        write_models(config, device, dtype, Path(folder), ["expert"])
        pair, opening, _ = timed(lambda: open_pair(*names, lambda *_: None))
        resident = ResidentModel(pair, dtype, device)
        _, reading, _ = timed(lambda: resident.move_to(0.0))
        print(f"  both files compared in {opening:.3g} s, the base read in {reading:.3g} s")
        prompts = samples(count, length, max(1, length // 8), config.vocab_size)
        size = auto_batch_size(prompts, config.vocab_size, device)
        references = measure_references(resident, prompts, ("kl",), size)

        def run_all(blocks_of: Callable[[Recordings], Iterable[Block]]) -> None:
            recordings = Recordings(resident, references, ("kl",))
            at_once = AtOnce(size, print, recordings.forget)
            for block in blocks_of(recordings):
                measure(block, recordings, at_once)

        spread = max(1, config.num_hidden_layers // layers)
        chosen = range(0, config.num_hidden_layers, spread)
        heads: dict[Kind, list[list[int]]] = {
            "head": [
                list(range(config.num_attention_heads)) if layer in chosen else []
                for layer in range(config.num_hidden_layers)
            ]
        }

        def exact() -> None:
            run_all(lambda recordings: exact_blocks(recordings, "gain", heads))

        def first_order() -> None:
            run_all(
                lambda recordings: first_order_blocks(recordings, "gain", SLICED_KINDS, 0, False)
            )

        def share() -> None:
            run_all(lambda recordings: share_blocks(recordings, 1))

        for what, work in (
            (f"exact heads of {len(chosen)} layers", exact),
            ("first-order gains", first_order),
            ("one share step", share),
        ):
            flops = counted(work)  # and all is warm
            _, seconds, _ = timed(work, 2)
            print(
                f"  {what}: {seconds:.3g} s, {flops / 1e12:.3g} TFLOP, "
                f"{flops / seconds / peak:.0%} of the matrix product's throughput",
                flush=True,
            )
            if profile:
                with profiling():
                    work()
    print(f"  peak: process {in_gib(peak_memory())}, GPUs {in_gib(peak_on_gpus())}")


def table(count: int, length: int, throughput: float, reading: float) -> str:
    """Computed cost of the same sweeps, nothing measured.

    Args:
        count: prompts.
        length: tokens of each, of which the first quarter is the same and an eighth the response.
        throughput: FLOP/s that products run at.
        reading: bytes a second that come from files to the device.
    """
    lines = [
        f"Computed, not measured: {count} prompts of {length} tokens as above, "
        f"{throughput / 1e12:.0f} TFLOP/s, {reading / 1e9:.3g} GB/s from the files, bfloat16.",
        "",
        "| shape | weights | first-order gains | one share step "
        "| exact heads, kl | exact heads, anchor at 60% |",
        "|---|---|---|---|---|---|",
    ]
    tokens, response = count * length, count * max(1, length // 8)
    packed = count * (length - length // 4) + length // 4  # what all begin with, once
    for shape in ("llama-3.2-1b", "llama-3-8b", "llama-3-70b"):
        config = config_of(shape)
        hidden, width = config.hidden_size, config.num_key_value_heads * config.head_dim
        p = 2 * hidden**2 + 2 * hidden * width + 3 * hidden * config.intermediate_size
        layers, unembedding = config.num_hidden_layers, hidden * config.vocab_size
        size = 2 * (p * layers + unembedding * (1 if config.tie_word_embeddings else 2))
        forward = 2 * (p * layers * tokens + unembedding * response)
        # passes as counted on cards; the donor is read once, both sides to move and for a delta
        costs = [(5 * forward, size), (3 * forward, 4 * size)]
        for depth, ends in ((layers, unembedding * response), (round(0.6 * layers), 0)):
            per_head = [2 * (p * packed * (depth - layer) + ends) for layer in range(depth)]
            attention = 2 * (2 * hidden**2 + 2 * hidden * width) * depth
            costs.append((config.num_attention_heads * sum(per_head), attention))
        said = [
            f"{flops / 1e15:.3g} PFLOP, {_time(flops / throughput + size / reading)}"
            for flops, size in costs
        ]
        lines.append(f"| {shape} | {size / 1e9:.3g} GB | " + " | ".join(said) + " |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    units = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
    size, unit = next((u for u in units if seconds >= u[0]), units[-1])
    return f"{seconds / size:.3g} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SIZES], default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--n-prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="layers whose heads are timed")
    parser.add_argument("--profile", action="store_true", help="a profile of each as well")
    parser.add_argument("--table", action="store_true", help="compute costs, run nothing")
    parser.add_argument("--throughput", type=float, default=450e12, help="FLOP/s for --table")
    parser.add_argument("--reading", type=float, default=9.5e9, help="bytes/s for --table")
    options = parser.parse_args()
    if options.table:
        if not (options.throughput > 0 and options.reading > 0):
            parser.error("--throughput and --reading are above 0")
        print(table(options.n_prompts, options.length, options.throughput, options.reading))
        return
    dtype = getattr(torch, options.dtype)
    run(
        options.shape,
        options.device,
        dtype,
        options.n_prompts,
        options.length,
        options.layers,
        options.profile,
    )


if __name__ == "__main__":
    main()
