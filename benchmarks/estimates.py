"""Can scores that were estimated from gradients be trusted, and what do exact swaps miss?

``python -m benchmarks.estimates`` scores every neuron of the zoo's experts exactly and by estimates
of three kinds, each checked by the same number of swaps, and prints a table of docs/scoring.md;
``--smollm2`` the other one, where the truth is more swaps of one expert. Experts of other seeds are
trained by ``python benchmarks/zoo/train.py``; all is kept in build/estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch

from benchmarks.engine.inputs import Case, Inputs, open_case
from benchmarks.files import REPO
from benchmarks.smollm2.paths import SMOLLM2
from mergekit_wp.engine.gradients import criterion_gradients, record_with_gradients
from mergekit_wp.engine.replay import Receiver
from mergekit_wp.files.manifest import Fidelity
from mergekit_wp.files.scorefile import ScoreFile, read
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.runs.recordings import Portion, receiver_position
from mergekit_wp.scoring.fidelity import leaders, uniform_sample, verdict
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.terms import CriterionName, LoneEstimand

BUILD = REPO / "build" / "estimates"
ESTIMANDS: tuple[LoneEstimand, ...] = ("gain", "activation_gain", "knockout")
CRITERIA: tuple[CriterionName, ...] = ("kl", "logprob", "anchor")
#: scores of the table that have a second order, and those that it changes nothing of: by the anchor
#: there is none, and of a knockout by ``kl`` there is nothing else
CURVED: tuple[tuple[LoneEstimand, CriterionName], ...] = (
    ("gain", "kl"),
    ("activation_gain", "kl"),
    ("knockout", "logprob"),
)
OTHERS: tuple[tuple[LoneEstimand, CriterionName], ...] = (("knockout", "kl"), ("gain", "anchor"))
#: leaders, and as many random components, that are swapped: by default, so many fewer as probes
#: cost, and for the truth on SmolLM2
SWAPS, LESS, TRUTH = 32, 24, 96
FIRST, FLAG, CORRECTION = "first order", "two gradients, flag", "two gradients, correction"
OURS, FEWER = "as scored", "as scored, 24 swaps each"
ROWS = (FIRST, FLAG, CORRECTION, FEWER, OURS)


@dataclass(frozen=True)
class Outcome:
    """What estimates of one kind do; sizes are parts of the largest exact |score|.

    Attributes:
        missed: the largest exact |score| that was not swapped.
        leading: which part of the true top 1% was swapped.
        error: the largest error of what was not swapped.
        errors: sum of errors of what was not swapped, of the sum of all exact |scores|.
        bound: what `score` states of the others.
        held: whether the bound does.
    """

    missed: float
    leading: float
    error: float
    errors: float
    bound: float
    held: bool

    @classmethod
    def of(cls, exact: torch.Tensor, estimate: torch.Tensor, stated: Fidelity) -> Outcome:
        """Judge estimates where the truth is known; it is NaN elsewhere."""
        assert stated.swapped is not None and stated.bound is not None
        known = exact.isfinite()
        others = known.clone()
        others[list(stated.swapped)] = False
        sizes = exact.abs().nan_to_num(-1.0)
        top = sizes.topk(max(1, round(len(exact) / 100))).indices
        largest, missed = float(sizes.max()), float(sizes[others].max())
        off = (exact - estimate)[others].abs()
        return cls(
            missed / largest,
            1 - float(others[top].double().mean()),
            float(off.max()) / largest,
            float(off.sum() / exact[known].abs().sum()),
            stated.bound / largest,
            missed <= stated.bound,
        )


def scored(case: Case, name: str, n_prompts: int, **options: Any) -> ScoreFile:
    """A score file of neurons, made if it is not there."""
    out = BUILD / f"{case.name}-{n_prompts}" / f"{name}.safetensors"
    if not out.exists():
        request = ScoreRequest(
            base=str(case.base),
            expert=str(case.expert),
            prompts=case.prompts,
            max_prompts=n_prompts,
            kinds=("neuron",),
            dtype="float32",
            out=out,
            **options,
        )
        score(request, NoProgress())
    return read(out)


def differences(inputs: Inputs, estimand: LoneEstimand, c: CriterionName) -> torch.Tensor:
    """How the gradient differs where all neurons of the layer are exchanged, along each change.

    Returns:
        ``[layers, neurons]``, means over prompts.
    """
    recordings = inputs.recordings((c,))
    dims = recordings.partition.dims
    found = torch.zeros((dims.n_layers, dims.n_neurons)).double()
    for number, every in enumerate(inputs.references.batches):
        recordings.resident.move_to(receiver_position(estimand))
        batch, targets = recordings.prompts(Portion(number, 0, every.size, every.size))
        recording = record_with_gradients(recordings.decoder, batch)
        receiver = Receiver(recordings.decoder, recording, (c,), targets)
        start = criterion_gradients(receiver)[c]
        for layer in range(dims.n_layers):
            call = recording.calls[layer]
            with torch.no_grad():
                change = recordings.changes(estimand, layer, receiver, ["neuron"])["neuron"]
                whole = change.changes(range(dims.n_neurons)).sum(0, keepdim=True)
            moved = (call.mlp.detach() + whole).requires_grad_()
            attention = call.attention.detach().unsqueeze(0)
            hidden = receiver.layer_output(layer, attention=attention, mlp=moved)
            (end,) = torch.autograd.grad(receiver.replay(hidden, layer)[c].sum(), moved)
            own = start.of("neuron", layer)
            assert own is not None
            found[layer] += change.project(end[0] - own).sum(0).double()
    return found / recordings.n_prompts


def of_expert(
    case: Case, n_prompts: int
) -> Iterator[tuple[LoneEstimand, CriterionName, str, Outcome]]:
    """Outcomes of one expert of the zoo."""
    exact = scored(
        case, "exact", n_prompts, estimand=ESTIMANDS, criterion=CRITERIA, exact_budget=math.inf
    )
    inputs = open_case(case, n_prompts, torch.float32, "cpu")
    for estimand, c in CURVED + OTHERS:
        key, label = f"{estimand}/{c}/neuron", f"{estimand}-{c}"
        truth = exact.tensors[key].flatten().double()
        options = {"estimand": (estimand,), "criterion": (c,), "exact_budget": -1.0}
        ways = (
            {FIRST: SWAPS, FEWER: LESS, OURS: SWAPS} if (estimand, c) in CURVED else {OURS: SWAPS}
        )
        for row, swaps in ways.items():
            way = {"verify": swaps, "curvature": row != FIRST}
            file = scored(case, f"{row}-{label}", n_prompts, **way, **options)
            found = file.tensors[key].flatten().double()
            yield estimand, c, row, Outcome.of(truth, found, file.manifest.fidelity[key])
        if (estimand, c) in OTHERS:
            continue
        plain = scored(case, f"plain-{label}", n_prompts, curvature=False, verify=0, **options)
        first, scale = plain.tensors[key].flatten().double(), exact.manifest.scale[c]
        distance = (scale.expert - scale.base) * (-1 if estimand == "knockout" else 1)
        half = differences(inputs, estimand, c).flatten() / distance / 2
        trapezoid = first + half
        for row, estimate, doubtful in (
            (FLAG, first, first.abs() + half.abs()),
            (CORRECTION, trapezoid, trapezoid),
        ):
            top = leaders(doubtful, SWAPS)
            random = uniform_sample(torch.ones_like(truth, dtype=torch.bool), SWAPS, 0)
            stated = verdict(estimate, truth, top, random, "first-order")
            stated = stated.model_copy(update={"swapped": tuple({*top, *random})})
            yield estimand, c, row, Outcome.of(truth, estimate, stated)


def zoo(seeds: list[int], n_prompts: int) -> str:
    """The table of the zoo: means over experts."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for seed in seeds:
        folder = REPO / "build" / "zoo" / f"seed{seed}"
        for skill in ("inst", "math", "sort"):
            case = Case(
                f"{seed}-{skill}",
                folder / "base",
                folder / skill,
                folder / "prompts" / f"{skill}.jsonl",
            )
            for estimand, c, row, outcome in of_expert(case, n_prompts):
                found.setdefault((estimand, c, row), []).append(outcome)
    lines = [
        "| estimand | criterion | estimates | largest missed | top 1% swapped | largest error | "
        "sum of errors | stated bound | holds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    order = [(*pair, row) for pair in CURVED + OTHERS for row in ROWS]
    for estimand, c, row in [key for key in order if key in found]:
        outcomes = found[estimand, c, row]
        n = len(outcomes)
        numbers = (
            sum(getattr(one, name) for one in outcomes) / n
            for name in ("missed", "leading", "error", "errors", "bound")
        )
        held = sum(one.held for one in outcomes)
        cells = (estimand, c, row, *(f"{value:.3f}" for value in numbers), f"{held} of {n}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def smollm2(skill: str, n_prompts: int) -> str:
    """The table of SmolLM2: the truth are the leaders of many more swaps, and random neurons."""
    case = Case(f"smollm2-{skill}", SMOLLM2.base, SMOLLM2.expert(skill), SMOLLM2.prompts(skill))
    lines = [
        "| score | estimates | known exactly | largest missed | largest error | stated bound | "
        "holds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for estimand, c in (("gain", "kl"), ("knockout", "logprob")):
        key = f"{estimand}/{c}/neuron"
        options = {"estimand": (estimand,), "criterion": (c,), "exact_budget": -1.0}
        known = scored(case, f"truth-{estimand}-{c}", n_prompts, verify=TRUTH, **options)
        swapped = torch.tensor(known.manifest.fidelity[key].swapped)
        truth = torch.full_like(known.tensors[key].flatten(), math.nan).double()
        truth[swapped] = known.tensors[key].flatten()[swapped].double()
        for row, curvature in ((FIRST, False), (OURS, True)):
            file = scored(case, f"{row}-{estimand}-{c}", n_prompts, curvature=curvature, **options)
            estimate = file.tensors[key].flatten().double()
            one = Outcome.of(truth, estimate, file.manifest.fidelity[key])
            numbers = (f"{value:.3f}" for value in (one.missed, one.error, one.bound))
            cells = (key, row, f"{len(swapped):,}", *numbers, "yes" if one.held else "no")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default="2,4,6", help="The zoo's; 0 and 1 were looked at.")
@click.option("--n-prompts", default=32, help="Of every expert of the zoo.")
@click.option("--smollm2", "skill", help="An expert of SmolLM2 instead, by 8 prompts.")
def main(seeds: str, n_prompts: int, skill: str | None) -> None:
    """Print one of the tables."""
    torch.set_num_threads(1)
    if skill is not None:
        click.echo(smollm2(skill, 8))
    else:
        click.echo(zoo([int(seed) for seed in seeds.split(",")], n_prompts))


if __name__ == "__main__":
    main()
