"""Scores of every head, K/V group and neuron of a pair, by each method that is compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiled.pairs import Pair
from benchmarks.compiled.truth import Run, difference, size
from benchmarks.components import Component, slices
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.terms import SLICED_KINDS, LoneEstimand

Scores = dict[str, float]

EXACT: tuple[LoneEstimand, ...] = (
    "gain",
    "knockout",
    "share",
    "activation_gain",
    "activation_knockout",
)
#: attention that is all but hard turns over within a hundredth of the way from base to expert
MIDPOINTS = 100
FIRST_ORDER: tuple[LoneEstimand, ...] = ("gain", "activation_gain")
#: by the name of the table; whether it looks at weights
METHODS = {
    "gain": True,
    "gain by prompt": True,
    "gain, first order": True,
    "knockout": True,
    "share": True,
    "share, 100 midpoints": True,
    "gradient times difference": True,
    "|Δ|": True,
    "|Δ|·|activation|": True,
    "activation_gain": False,
    "activation_knockout": False,
    "attribution patching": False,
}


def scores(
    pair: Pair, live: tuple[Component, ...], folder: Path
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Scores by method and component, and what the shares of all components sum to.

    Args:
        pair: base and expert.
        live: the components to score.
        folder: for checkpoints, may hold those of a pair before.
    """
    for who, state in pair.states.items():
        pair.save(folder / who, state)
    exact = scored(pair, folder, EXACT, math.inf)
    screened = scored(pair, folder, FIRST_ORDER, -1.0, curvature=False)
    finer = scored(pair, folder, ("share",), math.inf, share_steps=MIDPOINTS)
    by_prompt = scored(pair, folder, ("gain",), math.inf, normalise="prompt")
    found = {estimand: _of(exact, estimand, live) for estimand in EXACT}
    found["share, 100 midpoints"] = _of(finer, "share", live)
    found["gain by prompt"] = _of(by_prompt, "gain", live)
    found["gain, first order"] = _of(screened, "gain", live)
    found["attribution patching"] = _of(screened, "activation_gain", live)
    found["gradient times difference"] = gradient_times_difference(pair, live)
    found["|Δ|"], found["|Δ|·|activation|"] = sizes(pair, live)
    sums = {"share": exact, "share, 100 midpoints": finer}
    return (
        {method: found[method] for method in METHODS},
        {name: file.manifest.completeness["share/kl"] for name, file in sums.items()},
    )


def scored(
    pair: Pair,
    folder: Path,
    estimands: tuple[LoneEstimand, ...],
    budget: float,
    **options: Any,
) -> ScoreFile:
    """What `mergekit-wp score` finds, by ``kl`` at every output of the program."""
    request = ScoreRequest(
        base=str(folder / "base"),
        expert=str(folder / "expert"),
        prompts=pair.prompts,
        estimand=estimands,
        criterion=("kl",),
        kinds=SLICED_KINDS,
        dtype="float64",
        batch_size=len(pair.prompts),
        verify=0,
        exact_budget=budget,
        **options,
    )
    return score(request, NoProgress())


def _of(file: ScoreFile, estimand: LoneEstimand, live: tuple[Component, ...]) -> Scores:
    values = {kind: file.scores(estimand, "kl", kind) for kind in SLICED_KINDS}
    return {c.name: float(values[c.kind][c.layer, c.index]) for c in live}


def gradient_times_difference(pair: Pair, live: tuple[Component, ...]) -> Scores:
    """The slope of ``kl`` at the base along each component's part of the task vector."""
    base, expert = pair.states["base"], pair.states["expert"]
    model = pair.model(base).requires_grad_(True)
    wanted = torch.log_softmax(pair.model(expert)(pair.ids).logits, -1)[:, 1:]
    own = torch.log_softmax(model(pair.ids).logits, -1)[:, 1:]
    (wanted.exp() * (own - wanted)).sum(-1).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    delta = difference(base, expert)
    products = {name: gradients[name] * delta[name] for name in base}
    return {
        c.name: sum(float(products[n][i].sum()) for n, i in slices(pair.partition, c).items())
        for c in live
    }


def sizes(pair: Pair, live: tuple[Component, ...]) -> tuple[Scores, Scores]:
    """Norms of the components' differences; the same with each column times its input's norm.

    Inputs are the base's own, as a root of mean squares (Wanda, Sun et al., arXiv 2306.11695).
    """
    base, expert = pair.states["base"], pair.states["expert"]
    delta, run = difference(base, expert), Run(pair, base)
    weighted = {}
    for name, tensor in delta.items():
        parts = name.split(".")
        if parts[1] != "layers":
            continue
        key, into = f"{parts[2]}.{parts[3]}", parts[4] in ("o_proj", "down_proj")
        entering = (run.read if into else run.entering)[key]
        weighted[name] = tensor * entering.flatten(0, -2).square().mean(0).sqrt()
    return (
        {c.name: size(pair.partition, delta, c) for c in live},
        {c.name: size(pair.partition, weighted, c) for c in live},
    )
