"""What a fit reached, told of a merge by the fitted gates as they are and of no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_wp.card.scores import ScoreCopy
from mergekit_wp.errors import option, spelled
from mergekit_wp.files.fit_section import ENOUGH, Fit
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.merging.recipe import Recipe
from mergekit_wp.report.words import clean, count, markdown

_HEAD = "## What the fit reached\n\n"


def fit_section(
    recipe: Recipe, tasks: Sequence[ExecuteMergeMethodTask], copies: Sequence[ScoreCopy]
) -> str | None:
    """Each behaviour and guard at the fitted gates, and on which prompts that was measured.

    Args:
        recipe: a weight_patching recipe.
        tasks: mergekit's plan of it.
        copies: its score files.

    Returns:
        One sentence where the merge has other gates; None where nothing was fitted.
    """
    manifests = [copy.manifest for copy in copies]
    fit = next((manifest.fit for manifest in manifests if manifest.fit is not None), None)
    if fit is None:
        return None
    if not _as_fitted(recipe, tasks, manifests):
        return (
            f"{_HEAD}This recipe changes the gates that were fitted, so what the fit reached is "
            "not said of this model: measure it with `mergekit-wp compare`.\n"
        )
    recoveries = {member.behavior: member.recovery for member in manifests[0].company or ()}
    rows = [
        (
            clean(own.behavior),
            f"{fit.reached[own.behavior].answers:.2f}",
            f"{fit.reached[own.behavior].tokens:.2f}",
            f"{recoveries[own.behavior]:.2f}",
            _prompts(fit, own.behavior, own.n_prompts),
        )
        for own in manifests
    ]
    head = ("behaviour", "answers whole", "tokens", "recovery", "measured on")
    said = "".join(f"\n{line}\n" for line in _lines(fit, manifests))
    return (
        f"{_HEAD}Of each expert's own answers the share that the merge reproduces whole, the share "
        "of their tokens, and how far the behaviour has come from the base (0) to the expert (1)."
        f"\n\n{markdown(head, rows, len(head))}{said}"
    )


def _as_fitted(
    recipe: Recipe, tasks: Sequence[ExecuteMergeMethodTask], manifests: Sequence[Manifest]
) -> bool:
    """Whether a merge takes of every expert of one fit what the fit says, in every tensor."""
    first = manifests[0]
    company = [member.behavior for member in first.company or ()]
    together = all((m.company, m.fit) == (first.company, first.fit) for m in manifests)
    whole = not recipe.config.slices and not recipe.config.modules
    everybody = sorted(manifest.behavior for manifest in manifests) == sorted(company)
    return together and whole and everybody and all(_leaves_gates(task) for task in tasks)


def _leaves_gates(task: ExecuteMergeMethodTask) -> bool:
    own = [given for model, given in task.input_parameters.items() if model != task.base_model]
    shared = [task.parameters[name] for name in ("fusion", "lambda", "granularity")]
    return shared == ["path", 1, "component"] and all(
        given["weight"] == given["density"] == 1 for given in own
    )


def _prompts(fit: Fit, behavior: str, number: int) -> str:
    if held_out := fit.held_out[behavior]:
        return count(held_out, "held-out prompt")
    return f"the {count(number, 'prompt')} it was fitted on"


def _lines(fit: Fit, manifests: Sequence[Manifest]) -> Iterator[str]:
    """What limits these numbers, and what becomes of the base's own abilities."""
    names = [manifest.behavior for manifest in manifests]
    if seen_before := [clean(name) for name in names if not fit.held_out[name]]:
        yield (
            f"No prompts of {', '.join(seen_before)} were held out, and shares on those that were "
            "fitted on say little of others: `mergekit-wp compare` measures these."
        )
    if poor := [clean(name) for name in names if fit.reached[name].answers < ENOUGH]:
        stopped = "" if fit.done else ", and the fit was stopped before it was done"
        yield (
            f"**Of {', '.join(poor)} less than {ENOUGH:g} of the expert's answers are reproduced "
            f"whole{stopped}.** Other words may be right, too: `mergekit-wp compare` measures the "
            "skill itself."
        )
    for guard in fit.guards:
        yield (
            f"Guard {clean(guard.behavior)}: {fit.reached[guard.behavior].ratio:.3f} times the "
            f"base's perplexity on {_prompts(fit, guard.behavior, guard.n_prompts)}; the limit of "
            f"{fit.allowed(guard.behavior):g} is {fit.verdict(guard.behavior)}; of the base's own "
            f"tokens there {fit.reached[guard.behavior].tokens:.2f} are still the likeliest."
        )
    if not fit.guards:
        yield (
            "Nothing was guarded: whether the base's own abilities are still there, `mergekit-wp "
            f"compare` with `{spelled(option('keep'), {})}` tells."
        )
