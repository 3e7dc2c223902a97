"""What a score file says to somebody who merges: three sentences."""

from __future__ import annotations

import numpy as np

from mergekit_wp.errors import option, spelled
from mergekit_wp.files.fit_section import ENOUGH, Fit
from mergekit_wp.files.manifest import Fidelity, Manifest, Verification
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import words
from mergekit_wp.report.ranking import leaders
from mergekit_wp.report.verification import curve, measures
from mergekit_wp.runs.warnings import CLOSE
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand

_DEPTHS = ("early", "middle", "late")
#: a correlation with exact swaps below this is said
_CORRELATED = 0.8


def verdict(score_file: ScoreFile) -> tuple[str, str, str]:
    """Where the behaviour sits, what a merge gets of it, and how far to trust that."""
    manifest = score_file.manifest
    criterion = manifest.criteria[0]
    if manifest.fit is not None:
        return (
            _returns(manifest, manifest.fit),
            _taken(score_file, criterion),
            _what_else(manifest.fit),
        )
    estimand = manifest.estimands[0]
    found = manifest.verification
    together = None if found is None else _together(found)
    return (
        _where(score_file, estimand, criterion),
        together or _leading(score_file, estimand, criterion),
        _trust(score_file, estimand, criterion),
    )


def _where(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> str:
    if not set(score_file.manifest.kinds) & {"tensor", *SLICED_KINDS}:
        return "The file has scores of whole layers only, so a merge cannot go by it."
    facts = words.portrait(score_file, estimand, criterion)
    if not facts.n_positive:
        return (
            "No component of the expert brings the base closer to this behaviour; are base and "
            "expert swapped, or the prompts another expert's?"
        )
    deep = _depth(score_file, f"{estimand}/{criterion}")
    return (
        f"Half of what makes the expert behave like this sits in {facts.n_half:,} of its "
        f"{words.count(facts.n, 'component')} ({words.percent(facts.n_half / facts.n)})"
        f"{'' if deep is None else f', most of it in the {deep[0]} layers ({deep[1]})'}."
    )


def _depth(score_file: ScoreFile, key: str) -> tuple[str, str] | None:
    """The third of the layers that holds most of the positive score of sliced kinds, and how much.

    None where no third holds half of it, and clearly more than its part of the layers.
    """
    layers = np.zeros(score_file.manifest.n_layers)
    for kind in SLICED_KINDS:
        if f"{key}/{kind}" in score_file.tensors:
            layers += score_file.tensors[f"{key}/{kind}"].clamp(min=0).double().sum(-1).numpy()
    if not layers.any():
        return None
    thirds = np.arange(len(layers)) * 3 // len(layers)
    parts = [float(layers[thirds == i].sum() / layers.sum()) for i in range(3)]
    first = int(np.argmax(parts))
    due = float((thirds == first).mean())
    if parts[first] < max(0.5, 1.2 * due):
        return None
    return _DEPTHS[first], words.percent(parts[first])


def _together(found: Verification) -> str | None:
    """What the largest set does to the last measure, which is behaviour where it was checked."""
    measure = measures(found)[-1]
    tops, randoms = (curve(found, "restoration", measure, name) for name in ("top", "random"))
    if not tops:
        return None
    what = "of the checked answers" if measure == "behavior" else "of the way"
    return (
        f"Put into the base together, the leading {tops[-1].size:,} bring back "
        f"{tops[-1].value:.2f} {what} (0 is the base, 1 the expert); as many drawn at random "
        f"{randoms[-1].value:.2f}."
    )


def _leading(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> str:
    listed = leaders(score_file, estimand, criterion, score_file.manifest.kinds, 3)
    rows = [row for row in listed[0].rows if row.score > 0] if listed else []
    if not rows:
        return "A merge by this file leaves the base as it is."
    *others, last = (words.clean(row.name) for row in rows)
    named = f"{', '.join(others)} and {last}" if others else last
    return f"A merge that should keep it needs {named} before all else."


def _trust(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> str:
    manifest = score_file.manifest
    if estimand == "share":
        facts = words.portrait(score_file, estimand, criterion)
        total = manifest.completeness.get(f"share/{criterion}", facts.total)
        if abs(total - 1) <= CLOSE:
            return (
                f"The parts add up to {total:.2f} of the whole way from base to expert, so a merge "
                "can go by them."
            )
        return (
            f"The parts add up to {total:.2f} of the way from base to expert, where 1 is right: "
            f"score again with more {_flag('share_steps')} before you merge by them."
        )
    poor = [
        (kind, found.pearson_random)
        for kind in SLICED_KINDS
        if (found := _fidelity(score_file, estimand, criterion, kind)) is not None
        and found.pearson_random is not None
        and found.pearson_random < _CORRELATED
    ]
    if poor:
        listed = ", ".join(f"{words.KIND_WORDS[kind]} {value:.2f}" for kind, value in poor)
        return (
            "Some scores are estimates that real swaps confirm only in part (their correlation: "
            f"{listed}): score again with a larger {_flag('verify')}."
        )
    return (
        "Each score is of one component alone; what many do together, 'share' says, by which a "
        "merge goes best."
    )


def _fidelity(
    score_file: ScoreFile, estimand: Estimand, criterion: CriterionName, kind: str
) -> Fidelity | None:
    return score_file.manifest.fidelity.get(f"{estimand}/{criterion}/{kind}")


def _returns(manifest: Manifest, fit: Fit) -> str:
    """What comes back of the behaviour, and of its company's."""
    members = manifest.company or ()
    back = {member.behavior: fit.reached[member.behavior] for member in members}
    own = back[manifest.behavior]
    which = fit.judged_on(manifest.behavior)
    said = (
        f"Merged by these gates, the model gives {own.answers:.0%} of the expert's own answers "
        f"on {which} to the last token, and {own.tokens:.0%} of their tokens"
    )
    others = ", ".join(
        f"{words.clean(name)} {seen.answers:.2f} and {seen.tokens:.2f}"
        for name, seen in back.items()
        if name != manifest.behavior
    )
    if others:
        said += f" ({others})"
    if own.answers < ENOUGH:
        more = "prompts, or fewer experts" if fit.done else "steps, for the fit was not done"
        said += (
            f"; give more {more}. Other words may be right, too: 'mergekit-wp "
            "compare' measures the skill itself"
        )
    return f"{said}."


def _taken(score_file: ScoreFile, criterion: CriterionName) -> str:
    facts = words.portrait(score_file, "path", criterion)
    if not facts.n:
        return "The file has scores of whole layers only, so a merge cannot go by it."
    mean = facts.total / facts.n
    return (
        f"On average the merge takes {mean:.0%} of how the expert changed a component, and "
        f"something of {facts.n_positive:,} of {words.count(facts.n, 'component')}."
    )


def _what_else(fit: Fit) -> str:
    """What becomes of the base's own abilities."""
    if not fit.guards:
        return (
            "Nothing was guarded: whether the base's own abilities are still there, "
            f"'mergekit-wp compare' with {_flag('keep')} tells."
        )
    said = []
    for guard in fit.guards:
        ratio = fit.reached[guard.behavior].ratio
        held = "within" if fit.held(guard.behavior) else "beyond"
        said.append(
            f"{words.clean(guard.behavior)} is at {ratio:.3f} times the base's perplexity, {held} "
            f"the limit of {fit.allowed(guard.behavior):g}"
        )
    beyond = [guard for guard in fit.guards if not fit.held(guard.behavior)]
    flags = dict.fromkeys(_flag("limit" if guard.limit is None else "limit_of") for guard in beyond)
    advice = f"; give more {_flag('steps')}, or a larger {' and '.join(flags)}" if beyond else ""
    return f"Of what was to stay as in the base, {'; '.join(said)}{advice}."


def _flag(name: str) -> str:
    """An option as a reader of the page types it."""
    return spelled(option(name), {})
