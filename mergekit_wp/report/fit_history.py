"""How a fit went: what it was taught, and how the objective rose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_wp.files.manifest import Manifest
from mergekit_wp.report.words import clean, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# told apart by the colour-blind (Okabe and Ito)
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What was fitted, on what, and where it came: (label, text); nothing without a fit."""
    fit = manifest.fit
    if fit is None:
        return []
    found = [
        ("guard", f"{clean(guard.behavior)}, {count(guard.n_prompts, 'prompt')}")
        for guard in fit.guards
    ]
    if fit.guards:
        weight = f"all experts together 1, all guards together {fit.guard_weight:g}"
        found.append(("weight", weight))
    found.append(
        (
            "fit",
            f"gates by {fit.granularity.replace('_', ' and ')}, from {clean(fit.start)}, "
            f"{fit.prompts_a_step} prompts of each a step, rate "
            f"{fit.rate:g}, penalty {fit.penalty:g}, up to {fit.upper:g}",
        )
    )
    best = fit.history[fit.best_step]
    for moment in dict.fromkeys((0, fit.best_step)):
        seen = fit.history[moment]
        values = seen.fitted if best.held_out is None else seen.held_out
        which = "fitted" if best.held_out is None else "held-out"
        said = ", ".join(f"{clean(name)} {value:.2f}" for name, value in (values or {}).items())
        found.append(("objective", f"after {moment} steps, recovered on {which} prompts: {said}"))
    return found


def draw(manifest: Manifest, axes: Axes) -> None:
    """Recovery of every behaviour by step: held-out with marks, fitted as a thin line."""
    fit = manifest.fit
    assert fit is not None
    looked = any(moment.held_out for moment in fit.history)
    for i, name in enumerate(fit.reached):
        colour, label = _CYCLE[i % len(_CYCLE)], clean(name)
        fitted = [(m.step, m.fitted[name]) for m in fit.history if m.fitted]
        held_out = [(m.step, m.held_out[name]) for m in fit.history if m.held_out]
        if fitted:
            x, y = zip(*fitted, strict=True)
            axes.plot(x, y, color=colour, lw=0.7, label=None if looked else label)
        if held_out:
            x, y = zip(*held_out, strict=True)
            axes.plot(x, y, color=colour, lw=1.5, marker="o", ms=3, label=label)
    axes.axvline(fit.best_step, color="#888888", lw=0.6, ls=":")
    axes.set_xlabel("step")
    axes.set_ylabel("recovery")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
