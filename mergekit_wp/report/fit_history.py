"""How a fit went: what it was taught, how the answers rose, what other limits would buy."""

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
        (
            "fit",
            f"gates by {fit.granularity.replace('_', ' and ')}, from {clean(fit.start)}, "
            f"{fit.prompts_a_step} prompts of each a step, rate "
            f"{fit.rate:g}, shrinkage {fit.shrinkage:g}, up to {fit.upper:g}",
        )
    ]
    guards = [guard.behavior for guard in fit.guards]
    own = {guard.behavior for guard in fit.guards if guard.limit is not None}
    which = clean(fit.judged_on(*(name for name in fit.held_out if name not in guards)))
    for step in dict.fromkeys((0, fit.best_step)):
        seen = fit.history[step].judged or {}
        said = ", ".join(
            f"{clean(name)} {one.answers:.2f} (tokens {one.tokens:.2f})"
            for name, one in seen.items()
            if name not in guards
        )
        found.append(("answers", f"after {step} steps, reproduced on {which}: {said}"))
    for guard in fit.guards:
        one = fit.reached[guard.behavior]
        verdict = fit.verdict(guard.behavior)
        if guard.price or fit.held(guard.behavior):
            verdict += f"; price {guard.price:.2g}" if guard.price else "; it cost nothing"
        found.append(
            (
                "guard",
                f"{clean(guard.behavior)}, {count(guard.n_prompts, 'prompt')}: {one.ratio:.3f} "
                f"times the base's perplexity, limit {fit.allowed(guard.behavior):g}, {verdict}; "
                f"answers reproduced {one.answers:.2f} (tokens {one.tokens:.2f})",
            )
        )
    for point in fit.curve if fit.front else ():
        answers = [
            f"{clean(n)} {one.answers:.2f}" for n, one in point.reached.items() if n not in guards
        ]
        kept = [
            f"{clean(n)} {point.reached[n].ratio:.3f}"
            + (f" (limit {fit.allowed(n, point):g})" if n in own else "")
            + ("" if fit.held(n, point) else ", beyond it")
            for n in guards
        ]
        found.append(
            (
                "front",
                f"limit {point.limit:g}: answers reproduced: {', '.join(answers)}; times the "
                f"base's perplexity: {', '.join(kept)}",
            )
        )
    return found


def draw_front(manifest: Manifest, axes: Axes) -> None:
    """Answers reproduced of every behaviour over what they cost the guard it harms most."""
    from mergekit_wp.report.figures import legend_above  # slow to import

    fit = manifest.fit
    assert fit is not None
    guards = [guard.behavior for guard in fit.guards]
    x = [max(point.reached[guard].ratio for guard in guards) for point in fit.curve]
    for i, name in enumerate(name for name in fit.reached if name not in guards):
        y = [point.reached[name].answers for point in fit.curve]
        colour = _CYCLE[i % len(_CYCLE)]
        axes.plot(x, y, color=colour, lw=1.5, marker="o", ms=3, label=clean(name))
    for point in fit.curve:
        axes.axvline(point.limit, color="#888888", lw=0.6, ls=":")
    axes.set_xlabel("times the base's perplexity on the worst guard; dotted: limits")
    axes.set_ylabel("answers reproduced")
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes)


def draw(manifest: Manifest, axes: Axes) -> None:
    """Answers reproduced of every behaviour by step: judged with marks, fitted as a thin line."""
    from mergekit_wp.report.figures import legend_above  # slow to import

    fit = manifest.fit
    assert fit is not None
    for i, name in enumerate(fit.reached):
        colour = _CYCLE[i % len(_CYCLE)]
        fitted = [(m.step, m.fitted[name].answers) for m in fit.history if m.fitted]
        judged = [(m.step, m.judged[name].answers) for m in fit.history if m.judged]
        if fitted:
            x, y = zip(*fitted, strict=True)
            axes.plot(x, y, color=colour, lw=0.4, alpha=0.5)
        x, y = zip(*judged, strict=True)
        axes.plot(x, y, color=colour, lw=1.5, marker="o", ms=3, label=clean(name))
    axes.axvline(fit.best_step, color="#888888", lw=0.6, ls=":")
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("answers reproduced")
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes)
