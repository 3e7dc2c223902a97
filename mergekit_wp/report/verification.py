"""The report card of a score file: curves of what its leading components do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.integrate import trapezoid

from mergekit_wp.files.manifest import SetPoint, Verification
from mergekit_wp.report.words import columns, count, interval
from mergekit_wp.statistics import Faithfulness, mib_sizes
from mergekit_wp.terms import Direction, SetName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS: tuple[Direction, ...] = ("restoration", "knockout")
SETS: tuple[SetName, ...] = ("top", "random", "bottom")
# told apart by the colour-blind, and by their marks in grey
_STYLE = {"top": ("#0072B2", "o"), "random": ("#888888", "s"), "bottom": ("#D55E00", "v")}


def curve(found: Verification, direction: str, measure: str, name: str) -> list[SetPoint]:
    """One curve, smallest set first."""
    wanted = (direction, measure, name)
    points = [p for p in found.points if (p.direction, p.measure, p.set) == wanted]
    return sorted(points, key=lambda point: point.size)


def measures(found: Verification) -> list[str]:
    """What was measured, in order."""
    return list(dict.fromkeys(point.measure for point in found.points))


def area(points: Sequence[SetPoint]) -> float:
    """Mean height of a curve over the logarithm of the size, by trapezoids; its value for one."""
    ordered = sorted(points, key=lambda point: point.size)
    if len(ordered) == 1:
        return ordered[0].value
    x = np.log([point.size for point in ordered])
    y = np.array([point.value for point in ordered])
    return float(trapezoid(y, x)) / float(x[-1] - x[0])


def faithfulness(found: Verification, points: Sequence[SetPoint]) -> Faithfulness | None:
    """MIB's two areas of a curve; None where sizes of MIB are not among its own.

    All components together are the other checkpoint, hence 1 without being measured.
    """
    if found.n_components is None:
        return None
    sizes = mib_sizes(found.n_components)
    values = {point.size: point.value for point in points} | {found.n_components: 1.0}
    if not values.keys() >= set(sizes):
        return None
    return Faithfulness.of([values[size] for size in sizes])


def heading(found: Verification) -> str:
    """What the numbers are, in one sentence."""
    items = f", {count(found.n_items, 'item')}" if found.n_items else ""
    return (
        f"ranked by {found.estimand}/{found.criterion}; {count(found.n_prompts, 'prompt')}{items}; "
        f"{found.draws} random draws; 95% intervals"
    )


def table(found: Verification) -> str:
    """The curves with their intervals, and the area under each over the logarithm of the size.

    Where MIB's sizes are among them, its own two areas too.
    """
    output = [heading(found)]
    for measure in measures(found):
        for direction in DIRECTIONS:
            curves = [curve(found, direction, measure, name) for name in SETS]
            rows = [
                (f"{points[0].size:,}", *map(interval, points))
                for points in zip(*curves, strict=True)
            ]
            rows.append(("area", *(f"{area(points):.2f}" for points in curves)))
            areas = [faithfulness(found, points) for points in curves]
            if all(areas):
                rows.append(("CPR", *(f"{of.cpr:.2f}" for of in areas if of)))
                rows.append(("CMD", *(f"{of.cmd:.2f}" for of in areas if of)))
            output += ["", f"{direction}, {measure}", columns(("size", *SETS), rows)]
    return "\n".join(output)


def sentences(found: Verification) -> list[str]:
    """For each measure: what the top sets do, and what random ones of the same kinds do."""
    said = []
    for measure in measures(found):
        for direction, verb in (("restoration", "restore"), ("knockout", "knock out")):
            top, random = (curve(found, direction, measure, name) for name in ("top", "random"))
            parts = [
                f"top {t.size:,} {t.value:.2f} (random {r.value:.2f})"
                for t, r in zip(top, random, strict=True)
            ]
            areas = f"area {area(top):.2f} against {area(random):.2f}"
            said.append(f"{verb} {measure}: {', '.join(parts)}; {areas}")
    return said


def draw(found: Verification, direction: Direction, measure: str, axes: Axes) -> None:
    """One direction of one measure: three curves with intervals over the size of the set."""
    from mergekit_wp.report.figures import legend_above  # slow to import

    for name in SETS:
        points = curve(found, direction, measure, name)
        x, y = [p.size for p in points], [p.value for p in points]
        spread = [
            [max(0.0, p.value - p.low) for p in points],
            [max(0.0, p.high - p.value) for p in points],
        ]
        colour, mark = _STYLE[name]
        axes.errorbar(x, y, spread, color=colour, marker=mark, capsize=2, linewidth=1.2, label=name)
    axes.set_xscale("log")
    axes.axhline(0, color="#888888", linewidth=0.6)
    axes.axhline(1, color="#888888", linewidth=0.6, linestyle=":")
    axes.set_xlabel("components in the set")
    axes.set_ylabel(f"{'restored' if direction == 'restoration' else 'knocked out'}, {measure}")
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes)
