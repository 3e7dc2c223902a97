"""Weights against activations: which components hold what the expert learned, which pass it on.

The claim of "Weight Patching" (arXiv 2604.13694) is that importance by activations is not where a
behaviour is encoded. Here both importances of the same components stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import words
from mergekit_wp.statistics import Array
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand, FineKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: a component is high on a side in the top 5% of its kind, low outside the top 20%
HIGH, LOW = 0.05, 0.2
PAIRS: tuple[tuple[Estimand, Estimand], ...] = (
    ("gain", "activation_gain"),
    ("knockout", "activation_knockout"),
)
DEPTHS = ("all layers", "early third", "middle third", "late third")
_EXAMPLES = 5


@dataclass(frozen=True)
class Side:
    """Both importances of the components of one kind at one depth.

    Attributes:
        kind: which components.
        depth: one of `DEPTHS`.
        n: how many.
        spearman: rank correlation of the two, None where one is constant.
        overlap: Jaccard overlap of the two top 5%, counted within the kind.
        weights_only: how many are high by weights and low by activations.
        activations_only: how many are high by activations and low by weights.
    """

    kind: FineKind
    depth: str
    n: int
    spearman: float | None
    overlap: float | None
    weights_only: int
    activations_only: int


@dataclass(frozen=True)
class WeightsVsActivations:
    """One estimand of weights beside the same of activations, by one criterion."""

    weights: Estimand
    activations: Estimand
    criterion: CriterionName
    rows: tuple[Side, ...]
    weights_only: tuple[str, ...]
    activations_only: tuple[str, ...]


def comparisons(score_file: ScoreFile) -> Iterator[WeightsVsActivations]:
    """Every pair of estimands that the file has on both sides, criterion by criterion."""
    have = score_file.manifest.estimands
    for weights, activations in PAIRS:
        if weights in have and activations in have:
            for criterion in score_file.manifest.criteria:
                if any(kind in score_file.manifest.kinds for kind in SLICED_KINDS):
                    yield _sides(score_file, weights, activations, criterion)


def both(
    score_file: ScoreFile,
    weights: Estimand,
    activations: Estimand,
    criterion: CriterionName,
    kind: FineKind,
) -> tuple[Array, Array]:
    """Scores by weights and by activations, ``[layers, count]`` each."""
    one, two = (
        score_file.scores(e, criterion, kind).numpy().astype(np.float64)
        for e in (weights, activations)
    )
    return one, two


def top(scores: Array, part: float) -> npt.NDArray[np.bool_]:
    """Which scores above zero are among the highest `part` (at least one), first of equals."""
    flat = scores.ravel()
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: max(1, round(part * len(flat)))]] = True
    return chosen.reshape(scores.shape) & (scores > 0)


def _sides(
    score_file: ScoreFile, weights: Estimand, activations: Estimand, criterion: CriterionName
) -> WeightsVsActivations:
    rows: list[Side] = []
    examples: dict[str, list[tuple[float, str]]] = {"weights": [], "activations": []}
    for kind in SLICED_KINDS:
        if kind not in score_file.manifest.kinds:
            continue
        one, two = both(score_file, weights, activations, criterion, kind)
        high = {"weights": top(one, HIGH), "activations": top(two, HIGH)}
        only = {
            "weights": high["weights"] & ~top(two, LOW),
            "activations": high["activations"] & ~top(one, LOW),
        }
        for depth, layers in _depths(len(one)).items():
            if len(layers) == 0:
                continue
            here = [side[layers] for side in (high["weights"], high["activations"])]
            union = int((here[0] | here[1]).sum())
            rows.append(
                Side(
                    kind,
                    depth,
                    one[layers].size,
                    _rank_correlation(one[layers], two[layers]),
                    int((here[0] & here[1]).sum()) / union if union else None,
                    int(only["weights"][layers].sum()),
                    int(only["activations"][layers].sum()),
                )
            )
        for side, values in (("weights", one), ("activations", two)):
            for layer, index in np.argwhere(only[side]).tolist():
                name = f"layer {layer} {kind} {index}"
                # kinds have scales of their own: compare within the kind's largest
                examples[side].append((values[layer, index] / np.abs(values).max(), name))
    listed = {
        side: tuple(name for _, name in sorted(found, key=lambda x: -x[0])[:_EXAMPLES])
        for side, found in examples.items()
    }
    return WeightsVsActivations(
        weights, activations, criterion, tuple(rows), listed["weights"], listed["activations"]
    )


def _depths(n_layers: int) -> dict[str, npt.NDArray[np.int64]]:
    layers = np.arange(n_layers)
    third = layers * 3 // n_layers
    return {DEPTHS[0]: layers} | {name: layers[third == i] for i, name in enumerate(DEPTHS[1:])}


def _rank_correlation(one: Array, two: Array) -> float | None:
    if one.size < 3 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(scipy.stats.spearmanr(one.ravel(), two.ravel()).statistic)


def sentences(found: WeightsVsActivations) -> list[str]:
    """What stands out, in words."""
    said = []
    for row in found.rows:
        if row.depth == DEPTHS[0] and row.spearman is not None:
            kind = words.KIND_WORDS[row.kind]
            said.append(
                f"{kind}: rank correlation {row.spearman:.2f}; high by weights only "
                f"{row.weights_only:,}, by activations only {row.activations_only:,} of {row.n:,}"
            )
    if found.activations_only:
        names = ", ".join(found.activations_only)
        said.append(f"by activations only, passing on what others supply: {names}")
    if found.weights_only:
        said.append(f"by weights only: {', '.join(found.weights_only)}")
    return said


def draw(score_file: ScoreFile, found: WeightsVsActivations, kind: FineKind, ax: Axes) -> None:
    """Scatter of one kind: by weights to the right, by activations upward, depth as colour."""
    one, two = both(score_file, found.weights, found.activations, found.criterion, kind)
    layers = np.repeat(np.arange(len(one)), one.shape[1])
    order = np.random.default_rng(0).permutation(one.size)  # no depth lies on top
    points = ax.scatter(
        one.ravel()[order],
        two.ravel()[order],
        c=layers[order],
        cmap="viridis",
        s=18 if one.size < 2000 else 4,
        linewidths=0,
        rasterized=one.size > 2000,
    )
    for axis, values in ((ax.xaxis, one), (ax.yaxis, two)):
        # most components score next to nothing: linear there, logarithmic beyond
        scale = float(np.quantile(np.abs(values), 0.9)) or float(np.abs(values).max()) or 1.0
        getattr(ax, f"set_{axis.axis_name}scale")("symlog", linthresh=scale)
        _few_ticks(axis, scale, values)
    ax.axhline(0, lw=0.5, color="gray")
    ax.axvline(0, lw=0.5, color="gray")
    ax.set_xlabel(f"{found.weights} (weights)")
    ax.set_ylabel(f"{found.activations} (activations)")
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(points, ax=ax)
    bar.set_label("layer")
    bar.ax.locator_params(axis="y", integer=True)


def _few_ticks(axis: Any, scale: float, values: Array) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # slow to import

    ends = [float(np.min(values)), float(np.max(values))]
    # an end has its tick where it does not stand on that of the scale or of zero
    apart = {end for end in ends if abs(end) > 3 * scale}
    ticks = sorted({t for t in (-scale, 0.0, scale) if ends[0] <= t <= ends[1]} | apart)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:.1g}"))
