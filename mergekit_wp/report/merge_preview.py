"""What a merge would take from a score file: components above zero, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.models.model_names import file_names
from mergekit_wp.report import words
from mergekit_wp.report.figures import legend_above
from mergekit_wp.terms import WEIGHT_ESTIMANDS, CriterionName, Estimand, Kind

_COLOURS: dict[Kind, str] = {"head": "#0072B2", "kv_group": "#E69F00", "neuron": "#009E73"}


@dataclass(frozen=True)
class MergePreview:
    """Components of the fine partition that score above zero.

    Attributes:
        estimand, criterion: which scores a merge would go by.
        taken: above zero and all, by kind.
        leading: part of the positive score in the leading 1%.
        by_layer: positive score of each layer, by sliced kind.
    """

    estimand: Estimand
    criterion: CriterionName
    taken: dict[Kind, tuple[int, int]]
    leading: float
    by_layer: dict[Kind, list[float]]


def merge_preview(score_file: ScoreFile) -> MergePreview | None:
    """By the first scores of weights that the file has; None where a merge could use none."""
    manifest = score_file.manifest
    wanted: tuple[Estimand, ...] = ("path", *WEIGHT_ESTIMANDS)
    estimand = next((e for e in wanted if e in manifest.estimands), None)
    if estimand is None:
        return None
    criterion = manifest.criteria[0]
    fine = score_file.fine_scores(estimand, criterion)
    if not fine:
        return None
    every = np.concatenate([part.numpy().reshape(-1) for part in fine.values()])
    positive = np.sort(every[every > 0].astype(np.float64))[::-1]
    first = max(1, round(0.01 * len(every)))
    return MergePreview(
        estimand,
        criterion,
        {kind: (int((part > 0).sum()), part.numel()) for kind, part in fine.items()},
        float(positive[:first].sum() / positive.sum()) if len(positive) else 0.0,
        {
            kind: part.clamp(min=0).double().sum(-1).tolist()
            for kind, part in fine.items()
            if kind in _COLOURS
        },
    )


def sentences(found: MergePreview) -> list[str]:
    """What a merge does with these scores."""
    parts = ", ".join(
        f"{taken:,} of {n:,} {'other tensors' if kind == 'tensor' else words.KIND_WORDS[kind]}"
        for kind, (taken, n) in found.taken.items()
    )
    how = (
        "fusion 'path' takes every component as far as its gate says"
        if found.estimand == "path"
        else "fusion 'share' divides every component among the experts in proportion to the "
        "square root of their parts of the positive score"
    )
    said = [
        f"{how}; where no expert scores above zero, the base stays",
        f"by {found.estimand}/{found.criterion} this expert has a claim on {parts}",
    ]
    if found.estimand != "path":
        said.append(
            f"the leading 1% of all components hold {words.percent(found.leading)} of its "
            "positive score"
        )
    return said


def draw(found: MergePreview, ax: Axes) -> None:
    """Positive score of each layer, kinds stacked."""
    below = np.zeros(len(next(iter(found.by_layer.values()))))
    layers = np.arange(len(below))
    for kind, values in found.by_layer.items():
        ax.bar(layers, values, bottom=below, color=_COLOURS[kind], label=words.KIND_WORDS[kind])
        below += np.array(values)
    ax.set_xlabel("layer")
    ax.locator_params(axis="x", integer=True)
    ax.set_ylabel(f"positive {found.estimand}")
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax)


def recipe(score_file: ScoreFile, found: MergePreview) -> str:
    """A recipe that merges by this file and its company's, or with experts to be filled in."""
    manifest = score_file.manifest
    fusion = "path" if found.estimand == "path" else "share"
    going_by = "" if fusion == "path" else f", estimand: {found.estimand}"
    if manifest.company is None:
        experts = [
            (manifest.expert.reference, "THIS-FILE"),
            ("ANOTHER-EXPERT", "ITS-FILE"),
        ]
    else:
        references = [member.reference for member in manifest.company]
        experts = list(zip(references, file_names(references), strict=True))
    models = "".join(
        f"  - model: {words.clean(model)}\n"
        f"    parameters: {{scores: {words.clean(name)}.safetensors}}\n"
        for model, name in experts
    )
    return (
        "merge_method: weight_patching\n"
        f"base_model: {words.clean(manifest.base.reference)}\n"
        f"models:\n{models}"
        f"parameters: {{fusion: {fusion}{going_by}, criterion: {found.criterion}}}\n"
        "dtype: bfloat16\n"
    )
