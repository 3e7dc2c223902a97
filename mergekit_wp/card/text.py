"""The sections of a merge's model card, in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from mergekit_wp.card.contributions import Contributions
from mergekit_wp.card.evaluation import Evaluation
from mergekit_wp.card.scores import ScoreCopy
from mergekit_wp.card.sources import Source
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.model_names import distinct_names
from mergekit_wp.report.words import KIND_WORDS, clean, fidelity_rows, markdown
from mergekit_wp.terms import CriterionName, Estimand


def source_table(found: Sequence[Source]) -> str:
    """Inputs with their revisions and licences."""
    rows = [
        (
            f"[{s.path}](https://huggingface.co/{s.path})" if s.on_hub else f"`{shown(s.path)}`",
            s.role,
            f"`{s.revision}`" if s.revision else "not pinned" if s.on_hub else "a local folder",
            s.licence,
        )
        for s in found
    ]
    return "## Inputs\n\n" + markdown(("model", "role", "revision", "licence"), rows, 4)


def how_it_is_asked(
    found: TextInterface | None, taken: str, differs: Mapping[str, Sequence[str]]
) -> str:
    """Whose tokenizer, chat template and end tokens the merge has, and whose are others.

    Args:
        found: how the merge is asked, None where its folder has no tokenizer.
        taken: whose that is.
        differs: by model, what differs from the base's.
    """
    head = "## How to ask it\n\n"
    listed = "; ".join(f"`{shown(model)}` ({', '.join(what)})" for model, what in differs.items())
    others = f" Not asked as the base: {listed}." if listed else ""
    if found is None:
        return f"{head}This folder has no tokenizer.{others}\n"
    template = "with" if found.tokenizer.chat_template else "without"
    ends = ", ".join(f"`{token}`" for token in found.end_texts()) or "nothing"
    return (
        f"{head}This model has {taken}: prompts go {template} a chat template, and an answer ends "
        f"with {ends}.{others}\n"
    )


def contribution_table(found: Contributions, picture: str) -> str:
    """Components by expert: how many it leads, how many take from it, its mean gate."""
    names = distinct_names(found.experts)
    rows = []
    for kind, tally in found.kinds.items():
        for i, name in enumerate(names):
            rows.append(
                (
                    KIND_WORDS[kind] if i == 0 else "",
                    f"{tally.total:,}" if i == 0 else "",
                    name,
                    f"{tally.leading[i]:,.0f}",
                    f"{tally.taking[i]:,}",
                    f"{tally.gates[i]:.2f}",
                )
            )
    head = ("kind", "of", "expert", "leads", "gives to", "mean gate")
    return (
        "## What each expert contributed\n\n"
        f"![Share of components that each expert leads, by kind]({picture})\n\n"
        "An expert *leads* a component in which its gate is the largest, and *gives to* every "
        "component in which its gate is positive. A gate multiplies the expert's difference from "
        "the base: 0 keeps the base, 1 takes the expert.\n\n" + markdown(head, rows, len(head))
    )


def score_table(copies: Sequence[ScoreCopy], used: Iterable[tuple[Estimand, CriterionName]]) -> str:
    """Score files: what they measure, how far to trust them, and their hashes.

    Args:
        copies: the files beside the weights.
        used: the scores that the merge took: (estimand, criterion).
    """
    wanted = list(used)
    rows = [
        (
            f"[{copy.name}]({copy.name})",
            clean(copy.manifest.behavior),
            f"{copy.manifest.n_prompts}",
            "; ".join(_measured(copy.manifest, wanted)),
            f"`{copy.sha256}`",
        )
        for copy in copies
    ]
    head = ("file", "behaviour", "prompts", "how it was measured", "sha256")
    return "## Score files\n\n" + markdown(head, rows, len(head))


def _measured(manifest: Manifest, wanted: Sequence[tuple[Estimand, CriterionName]]) -> list[str]:
    said = []
    for estimand, criterion in wanted:
        if estimand not in manifest.estimands or criterion not in manifest.criteria:
            continue
        for row in fidelity_rows(manifest, estimand, criterion, manifest.kinds):
            kinds = ", ".join(KIND_WORDS[kind] for kind in row.kinds)
            said.append(f"{estimand}/{criterion} of {kinds}: {row.words}")
        if (key := f"{estimand}/{criterion}") in manifest.completeness:
            said.append(f"{key} sums to {manifest.completeness[key]:.3f} of 1")
    return said


def evaluation_section(measured: Evaluation) -> str:
    """The whole comparison; this merge is one of its rows."""
    return (
        f"## Evaluation\n\nThis model is **{measured.row}** in the comparison below, made with "
        "`mergekit-wp compare`; tuned methods chose their parameters on other items than are "
        f"reported here.\n\n{measured.table.strip()}\n"
    )


def how_to_repeat(config: str, version: str, scored: bool) -> str:
    """The command that makes the same merge."""
    files = " and its score files, all in this folder" if scored else ", in this folder"
    return (
        "## Repeat it\n\n"
        f"`mergekit-wp merge {config} OUT` of mergekit-wp {version} merges the "
        f"same models by the same recipe{files}.\n"
    )


def shown(path: str) -> str:
    """A local path without the author's folders."""
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path
