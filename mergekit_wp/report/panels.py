"""Panels of a score figure, each drawn on one axes: layers upward, as the residual stream runs.

Colours: red above zero, blue below, white at zero (a ColorBrewer scheme that stays readable with
any colour blindness), on one scale for all panels of a page; counts run from pale to dark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap, LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from mergekit_wp.architectures import Architecture, Dims
from mergekit_wp.architectures.declaration import module_of
from mergekit_wp.components import layout_of
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.statistics import Array
from mergekit_wp.terms import Kind

DIVERGING = "RdBu_r"
SEQUENTIAL = "Purples"
POSITIVE, NEGATIVE = "#b2182b", "#2166ac"
MISSING = "#dddddd"
_BINS = 49

# last part of a module's name -> column of the tensor panel
_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_COLUMNS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate+up", "down", "norms", "other")


@dataclass(frozen=True)
class ColourScale:
    """Which colour stands for which score, and what scores are called.

    Scores differ by orders of magnitude between kinds, so their colours follow the square root of
    the size; gates have a bound and are linear.

    Attributes:
        unit: what a score is called, such as ``share/kl`` or ``gate``.
        low: the least score that has a colour, at most 0.
        high: the largest, at least 0.
        gates: whether scores are gates, from 0 to ``high``.
    """

    unit: str
    low: float
    high: float
    gates: bool = False

    @classmethod
    def of_scores(cls, unit: str, scores: Iterable[Array]) -> ColourScale:
        """From the lowest to the highest of all these scores, NaN aside, and zero."""
        known = np.concatenate([np.zeros(1), *(x[np.isfinite(x)].ravel() for x in scores)])
        low, high = float(known.min()), float(known.max())
        return cls(unit, low, high if high > low else 1.0)

    @cached_property
    def norm(self) -> Normalize:
        """Scores to places in `colours`."""
        if self.gates:
            return Normalize(self.low, self.high)
        return FuncNorm((_root, _square), self.low, self.high)

    @cached_property
    def colours(self) -> ListedColormap:
        """The part of a diverging map that the scale covers, so that zero is white."""
        import matplotlib

        low, high = (self.low, self.high) if self.gates else _root(np.array([self.low, self.high]))
        end = max(-low, high)
        places = 0.5 + np.linspace(low, high, 256) / (2 * end)
        return ListedColormap(matplotlib.colormaps[DIVERGING](places))

    @property
    def ticks(self) -> list[float]:
        """The ends, zero, and what lies halfway between in colour."""
        half = self.high / (2 if self.gates else 4)
        marked = {0.0, half, self.high} if self.high > 0 else {0.0}
        return sorted(marked | ({self.low} if -self.low > 0.1 * self.high else set()))


def _root(scores: Array) -> Array:
    return np.asarray(np.sign(scores) * np.sqrt(np.abs(scores)))


def _square(roots: Array) -> Array:
    return np.asarray(np.sign(roots) * np.square(roots))


@dataclass(frozen=True)
class Panel:
    """One kind of component: its title, how wide to draw it, and how.

    ``draw`` returns what a colour bar should explain and its scale (None: numbers of neurons), or
    None for bars.
    """

    kind: Kind
    title: str
    width: float
    alt: str
    draw: Callable[[Axes], tuple[ScalarMappable, ColourScale | None] | None]


def make(
    manifest: Manifest, kind: Kind, scores: Array, se: Array | None, scale: ColourScale
) -> Panel:
    """The panel of one kind of component.

    Args:
        manifest: of the score file.
        kind: which components.
        scores: shaped as `Manifest.shape` says.
        se: standard errors of the same shape, where known.
        scale: of the page.
    """
    unit = scale.unit
    layers = f"{manifest.n_layers} layers (upward)"
    if kind == "layer":
        alt = f"Bars: {unit} of each of {layers}"
        return Panel(kind, "layers", 1.5, alt, lambda ax: _bars(ax, scores, se, scale))
    if kind == "tensor":
        grid, columns, outside = tensor_grid(manifest, scores, mean=scale.gates)
        alt = f"Heat map: {unit} of each whole tensor, {layers} by {', '.join(columns)}"
        if outside:
            alt += "; outside the layers: " + ", ".join(f"{n} {s:+.2g}" for n, s in outside)
        width = 0.6 + 0.33 * len(columns)
        return Panel(
            kind, "tensors", width, alt, lambda ax: _tensors(ax, grid, columns, outside, scale)
        )
    if kind == "neuron":
        n = manifest.n_neurons
        alt = f"Density: how many of {n} neurons have which {unit}, for each of {layers}"
        return Panel(kind, "neurons", 3.0, alt, lambda ax: _density(ax, scores, scale))
    word = "head" if kind == "head" else "K/V group"
    n = scores.shape[1]
    alt = f"Heat map: {unit} of each {word}, {layers} by {n} {word}s"
    width = min(max(0.16 * n, 1.2), 4.5)
    return Panel(kind, f"{word}s", width, alt, lambda ax: _heat(ax, scores, scale))


def limit(scores: Array) -> float:
    """The largest |score|, or 1 when all are zero."""
    return float(np.abs(scores).max(initial=0.0)) or 1.0


def tensor_grid(
    manifest: Manifest, scores: Array, *, mean: bool = False
) -> tuple[Array, list[str], list[tuple[str, float]]]:
    """Tensor scores as layers by role.

    Args:
        manifest: of the score file.
        scores: one for each of its tensors.
        mean: whether tensors of one role and layer have their mean, as gates do, not their sum.

    Returns:
        The grid (NaN where there is no such tensor), its column names, and the scores of the
        tensors outside the layers.
    """
    grid = np.full((manifest.n_layers, len(_COLUMNS)), np.nan)
    count = np.zeros(grid.shape)
    outside = []
    for name, score in zip(manifest.tensor_names, scores.tolist(), strict=True):
        layer = layout_of(name, manifest.dims).layer
        if layer is None or layer >= manifest.n_layers:
            outside.append((_short(name, manifest.dims.architecture), score))
            continue
        column = _COLUMNS.index(_role(name, manifest.dims))
        grid[layer, column] = np.nansum([grid[layer, column], score])
        count[layer, column] += 1
    if mean:
        grid /= np.maximum(count, 1)
    used = ~np.isnan(grid).all(axis=0)
    return grid[:, used], [c for c, keep in zip(_COLUMNS, used, strict=True) if keep], outside


def _role(name: str, dims: Dims) -> str:
    module = module_of(name).rpartition(".")[2]
    layout, place = layout_of(name, dims), dims.architecture.within_layer(name)
    if module in _ROLES:
        return _ROLES[module]
    if layout.whole or place is None:
        return "norms" if "norm" in module or module.startswith("ln_") else "other"
    if place[1] == dims.architecture.out(layout.kinds[0]):
        return "down" if "neuron" in layout.kinds else "o"
    if "neuron" in layout.kinds:
        return "gate+up" if len(layout.runs) > 1 else "up"
    return "qkv"


def _short(name: str, architecture: Architecture) -> str:
    """Name for a tensor outside the layers; anything unknown is plain 'other'."""
    module = module_of(name)
    known = {
        architecture.embedding: "embedding",
        architecture.positions: "positions",
        architecture.norm: "final norm",
        architecture.head: "lm_head",
    }
    if module in known:
        return known[module]
    for part, word in (("embed", "embedding"), ("lm_head", "lm_head"), ("norm", "final norm")):
        if part in name:
            return word
    return "other"


def _layer_axis(ax: Axes, n_layers: int) -> None:
    ax.set_ylim(-0.5, n_layers - 0.5)
    ax.set_yticks(_counting(n_layers, 8))
    ax.tick_params(length=2)


def _counting(n: int, most: int) -> range:
    """Ticks for 0 to n - 1, at steps of 1, 2, 4 or 8 (and so on)."""
    step = 1
    while n > most * step:
        step *= 2
    return range(0, n, step)


def _heat(ax: Axes, scores: Array, scale: ColourScale) -> tuple[ScalarMappable, ColourScale]:
    ax.set_xticks(_counting(scores.shape[1], 10))
    return _image(ax, scores, scale), scale


def _image(ax: Axes, grid: Array, scale: ColourScale) -> ScalarMappable:
    ax.set_facecolor(MISSING)
    image = ax.imshow(
        grid,
        cmap=scale.colours,
        norm=scale.norm,
        aspect="auto",
        origin="lower",
        interpolation="none",
    )
    _layer_axis(ax, grid.shape[0])
    return image


def _tensors(
    ax: Axes,
    grid: Array,
    columns: list[str],
    outside: list[tuple[str, float]],
    scale: ColourScale,
) -> tuple[ScalarMappable, ColourScale]:
    image = _image(ax, grid, scale)
    ax.set_xticks(range(len(columns)), columns)
    # such tensors have no layer, but are too few for a panel of their own
    note = "  ".join(f"{name} {signed(score)}" for name, score in outside[:3])
    ax.set_xlabel(note, fontsize="small")
    return image, scale


def _bars(ax: Axes, scores: Array, se: Array | None, scale: ColourScale) -> None:
    colours = [POSITIVE if score >= 0 else NEGATIVE for score in scores]
    ax.barh(np.arange(len(scores)), scores, xerr=se, color=colours, height=0.8, error_kw=_ERROR)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_xlabel(f"mean {scale.unit}" if scale.gates else scale.unit)
    if scale.gates:
        ax.set_xlim(scale.low, scale.high)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    _layer_axis(ax, len(scores))


_ERROR: dict[str, Any] = {"elinewidth": 0.8, "ecolor": "0.5"}


def bend(scores: Array) -> float:
    """Where the neurons' axis turns from linear to logarithmic.

    That is the median |score| that is not zero, held between one and four decades below the
    largest, so that leaders and the bulk are both visible.
    """
    end = limit(scores)
    sizes = np.abs(scores[scores != 0])
    bulk = float(np.median(sizes)) if sizes.size else end
    return float(np.clip(bulk, end * 1e-4, end * 1e-1))


def _density(ax: Axes, scores: Array, scale: ColourScale) -> tuple[ScalarMappable, None]:
    linear = bend(scores)
    shown = scores if scale.gates else np.arcsinh(scores / linear)
    end = float(np.abs(shown).max(initial=0.0)) * 1.001 or 1.0
    span = (scale.low, scale.high) if scale.gates else (-end, end)
    counts = np.stack([np.histogram(row, bins=_BINS, range=span)[0] for row in shown])
    ax.set_facecolor("white")
    image = ax.imshow(
        np.ma.masked_equal(counts, 0),
        cmap=_darker(SEQUENTIAL),
        norm=LogNorm(1, max(counts.max(initial=1), 2)),
        aspect="auto",
        origin="lower",
        interpolation="none",
        extent=(*span, -0.5, len(scores) - 0.5),
    )
    ax.axvline(0, color="0.5", linewidth=0.6, linestyle=":")
    if not scale.gates:
        ticks = _decades(limit(scores), linear)
        ax.set_xticks([float(np.arcsinh(t / linear)) for t in ticks], [_power(t) for t in ticks])
    ax.set_xlabel(scale.unit)
    _layer_axis(ax, len(scores))
    return image, None


def _darker(name: str) -> ListedColormap:
    """A sequential map without its palest part, so that a single neuron shows."""
    import matplotlib

    return ListedColormap(matplotlib.colormaps[name](np.linspace(0.25, 1, 256)))


def _decades(end: float, linear: float) -> list[float]:
    """Two powers of ten in the logarithmic part (or one), of both signs, and zero."""
    last = int(np.floor(np.log10(end)))
    first = min(int(np.ceil(np.log10(linear))) + 1, last)
    powers = [10.0**p for p in sorted({max(first, last - 2), last})]
    return [-p for p in reversed(powers)] + [0.0] + powers


def _power(value: float) -> str:
    exponent = str(round(np.log10(abs(value)))) if value else ""
    if exponent in ("", "-1", "0", "1"):
        return signed(value)
    raised = exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'−' if value < 0 else ''}10{raised}"


def signed(value: float) -> str:
    """Two figures with a true minus."""
    return f"{value + 0.0:.2g}".replace("-", "−")
