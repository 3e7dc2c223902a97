"""The findings of a score file in a few sentences, the most telling first."""

from __future__ import annotations

from itertools import islice

import numpy as np

from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import mechanism, verification, weights_vs_activations, words
from mergekit_wp.report.ranking import leaders
from mergekit_wp.terms import SLICED_KINDS

_DEPTHS = ("the early", "the middle", "the late")


def sentences(score_file: ScoreFile, trace: TraceFile | None = None) -> list[str]:
    """What stands out: where the score lies, what sets do, what is source and what passes on."""
    manifest = score_file.manifest
    estimand, criterion = manifest.estimands[0], manifest.criteria[0]
    said = []
    if set(manifest.kinds) & {"tensor", *SLICED_KINDS}:
        facts = words.portrait(score_file, estimand, criterion)
        said.append(f"by {estimand}/{criterion}, {facts.spread}")
        if where := _depth(score_file, f"{estimand}/{criterion}"):
            said.append(where)
    first = leaders(score_file, estimand, criterion, manifest.kinds, 3)
    leading = [row for row in first[0].rows if row.score > 0] if first else []
    if leading:
        named = ", ".join(f"{words.clean(row.name)} ({row.score:+.2g})" for row in leading)
        said.append(f"the highest {first[0].title}: {named}")
    if manifest.verification is not None:
        said += verification.sentences(manifest.verification)[:2]
    for found in islice(weights_vs_activations.comparisons(score_file), 1):
        said += weights_vs_activations.sentences(found)
    halves = [
        a
        for a in manifest.stability
        if (a.against, a.estimand, a.criterion) == ("halves", estimand, criterion)
        and a.kind in SLICED_KINDS
    ]
    if halves:
        said.append(
            f"the order is stable to this degree between {mechanism.agreement_sentence(halves)}"
        )
    if trace is not None:
        said += mechanism.circuit_sentences(trace)[1:4]
    return said


def _depth(score_file: ScoreFile, key: str) -> str | None:
    """How the positive score of sliced kinds is spread over thirds of the layers."""
    layers = np.zeros(score_file.manifest.n_layers)
    for kind in SLICED_KINDS:
        if f"{key}/{kind}" in score_file.tensors:
            layers += score_file.tensors[f"{key}/{kind}"].clamp(min=0).double().sum(-1).numpy()
    if not layers.any():
        return None
    thirds = np.arange(len(layers)) * 3 // len(layers)
    parts = [float(layers[thirds == i].sum() / layers.sum()) for i in range(3)]
    listed = ", ".join(
        f"{words.percent(part)} in {name} layers" for part, name in zip(parts, _DEPTHS, strict=True)
    )
    return f"of the positive score {listed}"
