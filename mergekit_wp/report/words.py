"""The facts of a score file in plain sentences, shared by the table and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mergekit_wp.errors import clean as clean
from mergekit_wp.files.manifest import Fidelity, Manifest, ModelId, SetPoint
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.statistics import Estimate
from mergekit_wp.terms import CriterionName, Estimand, Kind, ScoringMethod

#: Plural, as said in a sentence.
KIND_WORDS: dict[Kind, str] = {
    "layer": "layers",
    "tensor": "tensors",
    "head": "heads",
    "kv_group": "K/V groups",
    "neuron": "neurons",
}
ESTIMAND_WORDS: dict[Estimand, str] = {
    "share": "the component's part of the whole way from base to expert (integrated gradients)",
    "gain": "how far the base gets when only this component is swapped in from the expert "
    "(sufficiency); single swaps do not add up",
    "knockout": "how much the expert loses when only this component is set back to the base "
    "(necessity); single swaps do not add up",
    "activation_gain": "how far the base gets when the component writes what it writes in the "
    "expert's run; high without gain: it passes on what others supply",
    "activation_knockout": "how much the expert loses when the component writes what it writes in "
    "the base's run; high without knockout: it passes on what others supply",
    "path": "how far the component was taken from the base (0) to the expert (1), together with "
    "all experts of the recipe",
}
METHOD_WORDS: dict[ScoringMethod, str] = {
    "exact": "exact swaps",
    "first-order": "first-order",
    "second-order": "second-order (random probes of the Fisher information)",
    "integrated-gradients": "integrated gradients",
    "fitted": "gates fitted by gradient",
}


def percent(part: float) -> str:
    """A fraction as a percentage, with a decimal only where it matters."""
    if 0 < part < 0.0005:
        return "under 0.1%"
    return f"{part:.1%}" if abs(part) < 0.0995 else f"{part:.0%}"


def count(n: int, singular: str) -> str:
    """A number with its noun: 1 prompt, 1,536 neurons."""
    return f"{n:,} {singular}{'' if n == 1 else 's'}"


def interval(found: Estimate | SetPoint) -> str:
    """Two decimals: ``0.61 [0.55, 0.66]``."""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text for a terminal, its columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in (head, *rows))
    return "\n".join("  ".join(row).rstrip() for row in padded)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table in Markdown; columns from ``numbers`` on are aligned to the right."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    rule = "|---" * numbers + "|---:" * (len(head) - numbers) + "|"
    named, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([named, rule, *others]) + "\n"


def identity(manifest: Manifest) -> list[tuple[str, str]]:
    """What was scored: (label, text)."""
    return [
        ("base", _model(manifest.base)),
        ("expert", _model(manifest.expert)),
        (
            "model",
            f"{clean(manifest.architecture)}, {count(manifest.n_layers, 'layer')} of "
            f"{count(manifest.n_heads, 'head')}, {count(manifest.n_kv_groups, 'K/V group')} "
            f"and {count(manifest.n_neurons, 'neuron')}",
        ),
        (
            "scored",
            f"on {count(manifest.n_prompts, 'prompt')}, {clean(manifest.dtype)}, "
            f"seed {manifest.seed}, {clean(manifest.created)}",
        ),
        *_company(manifest),
    ]


def _company(manifest: Manifest) -> list[tuple[str, str]]:
    if manifest.company is None:
        return []
    members = ", ".join(clean(member.behavior) for member in manifest.company)
    return [("fitted", f"together: {members}")]


def _model(model: ModelId) -> str:
    revision = f" @ {model.revision}" if model.revision else ""
    return f"{clean(model.reference + revision)} ({clean(model.weights_dtype)})"


def criterion_facts(manifest: Manifest, criterion: CriterionName) -> str:
    """How far base and expert are apart, and what counts as noise."""
    parts = []
    if scale := manifest.scale.get(criterion):
        apart = abs(scale.expert - scale.base)
        parts.append(
            f"{scale.base:.4g} at the base, {scale.expert:.4g} at the expert: {apart:.4g} apart"
        )
    if criterion in manifest.noise_floor:
        parts.append(f"noise floor {manifest.noise_floor[criterion]:.2g}")
    if criterion == "anchor" and (anchor := manifest.anchor):
        pairs = f" from {count(anchor.n_contrasts, 'contrast')}" if anchor.n_contrasts else ""
        separates = (
            "too few prompts to hold any out"
            if anchor.separation is None
            else f"separation {anchor.separation:.3g} on held-out prompts"
        )
        parts.append(
            f"taken after layer {anchor.layer}, direction by {anchor.contrast}{pairs}, {separates}"
        )
    return "; ".join(parts) or "nothing recorded"


def method_words(fidelity: Fidelity) -> str:
    """How scores were computed: ``integrated gradients, 5 steps``."""
    steps = "" if fidelity.steps is None else f", {count(fidelity.steps, 'step')}"
    return METHOD_WORDS[fidelity.method] + steps


def fidelity_words(fidelity: Fidelity | None) -> str:
    """How scores were computed and how far to trust them, as one sentence."""
    if fidelity is None:
        return "method not recorded"
    words = method_words(fidelity)
    swaps = fidelity.verified_top + fidelity.verified_random
    if not swaps:
        return f"{words}; not verified by exact swaps" if fidelity.estimated else words
    words += (
        f"; against {count(swaps, 'exact swap')} ({count(fidelity.verified_top, 'leader')}, "
        f"{fidelity.verified_random:,} random)"
    )
    figures = [
        f"{name} {value:.3f}"
        for name, value in (
            ("Pearson", fidelity.pearson),
            ("Spearman", fidelity.spearman),
            ("Pearson of the random alone", fidelity.pearson_random),
        )
        if value is not None
    ]
    if fidelity.largest_missed is not None:
        figures.append(f"largest missed {fidelity.largest_missed:.2g}")
    words = f"{words}: {', '.join(figures)}" if figures else words
    if fidelity.bound is None:
        return words
    return (
        f"{words}; the largest error seen among these is {fidelity.largest_error:.2g}, so among "
        f"the others nothing larger than {fidelity.bound:.2g} is expected, by a random check of "
        f"{fidelity.verified_random:,}"
    )


@dataclass(frozen=True)
class FidelityRow:
    """Kinds of one estimand and criterion that share a fidelity statement."""

    estimand: Estimand
    criterion: CriterionName
    kinds: tuple[Kind, ...]
    fidelity: Fidelity | None

    @property
    def words(self) -> str:
        """The statement as a sentence."""
        return fidelity_words(self.fidelity)


def fidelity_rows(
    manifest: Manifest, estimand: Estimand, criterion: CriterionName, kinds: tuple[Kind, ...]
) -> list[FidelityRow]:
    """Fidelity of each kind; neighbours with the same statement share a row."""
    of_kind = {k: manifest.fidelity.get(f"{estimand}/{criterion}/{k}") for k in kinds}
    return [
        FidelityRow(estimand, criterion, tuple(group), fidelity)
        for fidelity, group in groupby(kinds, key=of_kind.__getitem__)
    ]


@dataclass(frozen=True)
class Portrait:
    """How the scores of one estimand and criterion are spread over the fine partition."""

    n: int
    total: float
    by_kind: dict[Kind, float]
    n_positive: int
    n_half: int

    @property
    def parts(self) -> list[tuple[str, float]]:
        """Kind in words and its part of the total; empty when the total is not positive."""
        if self.total <= 0:
            return []
        order = sorted(self.by_kind.items(), key=lambda item: -item[1])
        return [(_fine_word(kind), value / self.total) for kind, value in order]

    @property
    def spread(self) -> str:
        """How concentrated the positive scores are, as a sentence."""
        if not self.n_positive:
            return f"none of {count(self.n, 'component')} scores above zero"
        return (
            f"half of the positive score sits in {self.n_half:,} of "
            f"{count(self.n, 'component')} ({percent(self.n_half / self.n)})"
        )


def _fine_word(kind: Kind) -> str:
    return "other tensors" if kind == "tensor" else KIND_WORDS[kind]


def portrait(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> Portrait:
    """Sums and concentration over the fine partition, as far as the file's kinds reach."""
    fine = {
        kind: tensor.numpy().reshape(-1).astype(np.float64)
        for kind, tensor in score_file.fine_scores(estimand, criterion).items()
    }
    every = np.concatenate([np.empty(0), *fine.values()])
    mass = np.sort(every[every > 0])[::-1].cumsum()
    half = int(np.searchsorted(mass, mass[-1] / 2)) + 1 if len(mass) else 0
    return Portrait(
        n=len(every),
        total=float(every.sum()),
        by_kind={kind: float(values.sum()) for kind, values in fine.items()},
        n_positive=len(mass),
        n_half=half,
    )


def share_words(score_file: ScoreFile, criterion: CriterionName) -> str:
    """Completeness and the part of each kind, for estimand ``share``."""
    facts = portrait(score_file, "share", criterion)
    manifest = score_file.manifest
    stated = manifest.completeness.get(f"share/{criterion}")
    total = facts.total if stated is None else stated
    parts = ", ".join(f"{word} {percent(part)}" for word, part in facts.parts)
    return f"the shares add up to {total:.3g} (1 is complete)" + (f": {parts}" if parts else "")
