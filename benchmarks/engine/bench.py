"""The engine against the field's way of patching, in one process on the same inputs.

    python -m benchmarks.engine.bench --case zoo --case smollm2 --out build/engine
    python -m benchmarks.engine.bench --profile --case smollm2
    python -m benchmarks.engine.bench --inference-mode 9 --case zoo

(a) swap a component's weights and run the whole model; (b) the same, stopping at the anchor;
(c) the engine. Wall and CPU time, counted FLOPs, and the largest difference between scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.components import Component
from benchmarks.engine import ours
from benchmarks.engine.inputs import Inputs, cases, heads_and_neurons, open_case
from benchmarks.engine.measure import (
    Cost,
    counted,
    floor_formula,
    profiling,
    restart_formula,
    timed,
)
from benchmarks.engine.naive import NaiveSweep, Scores
from benchmarks.smollm2.paths import BUILD
from mergekit_wp.terms import CriterionName

Row = dict[str, str | float]


def measured(inputs: Inputs, components: list[Component], naive: int) -> list[Row]:
    """All rows of one case.

    Args:
        inputs: the case.
        components: to be swapped.
        naive: so many of them, evenly spaced, are swapped in ways (a) and (b), where every swap
            costs the same; their time is multiplied up.
    """
    some = components[:: max(1, len(components) // naive)]
    places = [components.index(component) for component in some]
    times = len(components) / len(some)
    full = NaiveSweep.of(inputs, stop_at_anchor=False)
    short = NaiveSweep.of(inputs, stop_at_anchor=True)
    inputs.resident.move_to(0.0)
    with torch.no_grad():
        per_patch = {id(sweep): counted(sweep.forward) for sweep in (full, short)}
    n_layers = inputs.partition.dims.n_layers
    anchor = inputs.references.targets[0].anchor
    assert anchor is not None
    depths: dict[CriterionName, int] = {"kl": n_layers, "anchor": anchor.layer + 1}
    true, wall, cpu = timed(lambda: full.run(some))
    a = Cost(times * wall, times * cpu, per_patch[id(full)] * len(components))
    rows = [_row(inputs, "(a) swap, whole forward", "both", components, n_layers, a, a, 0.0)]
    at_anchor, wall, cpu = timed(lambda: short.run(some))
    b = Cost(times * wall, times * cpu, per_patch[id(short)] * len(components))
    error = _difference(at_anchor, true, "anchor")
    depth = depths["anchor"]
    rows.append(_row(inputs, "(b) swap, stop at anchor", "anchor", components, depth, b, a, error))
    for criterion, depth in depths.items():
        found, wall, cpu = timed(lambda c=criterion: ours.exact(inputs, components, (c,)))
        flops = counted(lambda c=criterion: ours.exact(inputs, components, (c,)))
        error = _difference({criterion: found[criterion][places]}, true, criterion)
        cost = Cost(wall, cpu, flops)
        rows.append(_row(inputs, "(c) engine", criterion, components, depth, cost, a, error))
    return rows


def _difference(found: Scores, true: Scores, criterion: CriterionName) -> float:
    return float((found[criterion].double() - true[criterion].double()).abs().max())


def _row(
    inputs: Inputs,
    what: str,
    criterion: str,
    components: list[Component],
    depth: int,
    cost: Cost,
    whole: Cost,
    error: float,
) -> Row:
    floor = floor_formula(inputs.partition, components, inputs.tokens, depth)
    restart = restart_formula(inputs.partition, components, inputs.tokens, depth)
    return {
        "case": inputs.case.name,
        "what": what,
        "criterion": criterion,
        "wall": cost.wall,
        "cpu": cost.cpu,
        "GFLOP": cost.flops / 1e9,
        "times (a), wall": whole.wall / cost.wall,
        "times (a), CPU": whole.cpu / cost.cpu,
        "times (a), FLOPs": whole.flops / cost.flops,
        "FLOPs / floor": cost.flops / floor,
        "FLOPs / restart formula": cost.flops / restart,
        "largest score difference": error,
    }


def first_order_rows(inputs: Inputs) -> list[Row]:
    """First-order scores of everything, in forward passes."""
    full = NaiveSweep.of(inputs, stop_at_anchor=False)
    inputs.resident.move_to(0.0)

    def forward() -> object:
        with torch.no_grad():
            return full.forward()

    rows: list[Row] = []
    _, wall, cpu = timed(forward, 5)
    one = Cost(wall, cpu, counted(forward))
    for what, run in (
        ("first-order gains of all heads, K/V groups, neurons", ours.first_order),
        ("one share step: every fine component", ours.share_step),
    ):
        _, wall, cpu = timed(lambda run=run: run(inputs, ("kl",)), 3)
        flops = counted(lambda run=run: run(inputs, ("kl",)))
        rows.append(
            {
                "case": inputs.case.name,
                "what": what,
                "forwards, wall": wall / one.wall,
                "forwards, CPU": cpu / one.cpu,
                "forwards, FLOPs": flops / one.flops,
            }
        )
    return rows


def inference_row(inputs: Inputs, components: list[Component], pairs: int) -> Row:
    """What `torch.inference_mode` saves of an exact sweep by ``kl``, turn about without it."""
    ratios = []
    for _ in range(pairs):
        _, _, plain = timed(lambda: ours.exact(inputs, components, ("kl",)))
        with torch.inference_mode():
            _, _, within = timed(lambda: ours.exact(inputs, components, ("kl",)))
        ratios.append(within / plain)
    middle = sorted(ratios)
    return {
        "case": inputs.case.name,
        "what": "inference mode / no_grad, CPU",
        "median": middle[pairs // 2],
        "least": middle[0],
        "largest": middle[-1],
    }


def table(rows: list[Row]) -> str:
    """As Markdown; numbers with three digits."""
    lines = []
    for keys in dict.fromkeys(tuple(row) for row in rows):
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        for row in rows:
            if tuple(row) == keys:
                cells = (v if isinstance(v, str) else f"{v:.3g}" for v in row.values())
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = cases()
    parser.add_argument("--case", action="append", choices=[*known], help="default: all")
    parser.add_argument("--smollm2", type=Path, default=BUILD, help="folder of its checkpoints")
    parser.add_argument("--n-prompts", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=32)
    parser.add_argument("--naive", type=int, help="swap only so many the naive way; default: all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="only a profile of one sweep")
    parser.add_argument(
        "--inference-mode",
        type=int,
        metavar="PAIRS",
        help="only what torch.inference_mode saves, in so many pairs of sweeps",
    )
    parser.add_argument("--out", type=Path, help="folder for results.json and table.md")
    options = parser.parse_args()
    if options.inference_mode is not None and options.inference_mode < 1:
        parser.error("--inference-mode needs at least one pair")
    rows: list[Row] = []
    for name in options.case or known:
        case = cases(options.smollm2)[name]
        inputs = open_case(case, options.n_prompts, getattr(torch, options.dtype), options.device)
        components = heads_and_neurons(inputs.partition, options.neurons)
        if options.profile:
            with profiling():
                ours.exact(inputs, components, ("kl",))
            continue
        if options.inference_mode is not None:
            print(table([inference_row(inputs, components, options.inference_mode)]))
            continue
        found = measured(inputs, components, options.naive or len(components)) + first_order_rows(
            inputs
        )
        print(
            f"{name}: {len(components)} components, {inputs.tokens} tokens, "
            f"{torch.get_num_threads()} threads\n\n{table(found)}",
            flush=True,
        )
        rows += found
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(rows, indent=1))
        (options.out / "table.md").write_text(table(rows))


if __name__ == "__main__":
    main()
