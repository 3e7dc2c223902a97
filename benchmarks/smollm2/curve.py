"""The restoration curve as a table and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from mergekit_wp.statistics import Estimate, wilson


@dataclass(frozen=True)
class Point:
    """One merge: which scores, how many components, how many of n answers all in capitals."""

    scores: str
    density: float
    successes: int
    n: int

    @property
    def rate(self) -> float:
        """Fraction of answers all in capitals."""
        return self.successes / self.n

    @property
    def interval(self) -> Estimate:
        """The rate with Wilson's interval."""
        return wilson([1] * self.successes + [0] * (self.n - self.successes))


def table(points: list[Point], scored: str) -> str:
    """One line a density: the scored components, and the mean and range over the random draws."""
    lines = [f"{'components':<12}{'by score':<24}at random: mean (each draw)"]
    for density in sorted({p.density for p in points}):
        best = next(p for p in points if p.density == density and p.scores == scored)
        bar = best.interval
        draws = [p.rate for p in points if p.density == density and p.scores != scored]
        random = f"{statistics.mean(draws):.2f} ({', '.join(f'{r:.2f}' for r in draws)})"
        lines.append(
            f"{f'{density:.0%}':<12}{f'{best.rate:.2f} [{bar.low:.2f}, {bar.high:.2f}]':<24}"
            f"{random if draws else '-'}"
        )
    return "\n".join(lines)


def draw(points: list[Point], scored: str, levels: dict[str, float], out: Path) -> None:
    """The curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    best = sorted((p for p in points if p.scores == scored), key=lambda p: p.density)
    others = [p for p in points if p.scores != scored]
    x = [100 * p.density for p in best]
    bars = [p.interval for p in best]
    spread = [[b.value - b.low for b in bars], [b.high - b.value for b in bars]]
    axes.errorbar(x, [p.rate for p in best], spread, marker="o", capsize=3, label="top by share")
    random = [[p.rate for p in others if p.density == b.density] for b in best]
    if all(random):
        axes.plot(x, [statistics.mean(r) for r in random], color="grey", label="random, mean")
        xs = [100 * p.density for p in others]
        axes.scatter(xs, [p.rate for p in others], color="grey", s=14)
    for name, level in levels.items():
        axes.axhline(level, linestyle=":", color="black", linewidth=1)
        axes.annotate(name, (x[-1], level), ha="right", va="bottom", fontsize=8)
    axes.set(
        xlabel="components from the expert, %",
        ylabel="answers all in capitals, when asked",
        ylim=(-0.03, 1.05),
    )
    axes.legend(loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
