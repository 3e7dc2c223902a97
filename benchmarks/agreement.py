"""Does a merge that follows its experts' distributions give their answers?

Every merge is measured twice: by what can be computed without a task (divergence from each expert
on prompts that nothing was fitted on, and other criteria of the same forward pass), and by the
share of test items that it answers right by itself. The tables say which criterion ranks merges as
their answers do, and where the two part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.files import read_jsonl
from mergekit_wp.models.generation import TextInterface, greedy

#: of divergences over positions or prompts: 0 at the expert, and one share is the base's
DIVERGENCES = ("kl", "first token", "end", "worst token", "whole answer")
#: higher is closer already
SHARES = ("log of kl", "top-1", "probability", "answers")
#: recovered kl in bins, to see what hides in the highest
EDGES = (-np.inf, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, np.inf)
#: keeps the logarithm finite
_SMALLEST = 1e-4
Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """An expert's greedy answers to held-out prompts, and its distributions along them.

    Attributes:
        ids: prompt and answer, padded on the right, ``[prompts, length]``.
        answer: of each position whether it predicts a token of the answer or its end, alike.
        logprobs: the expert's, ``[positions of answers, vocabulary]``.
    """

    ids: torch.Tensor
    answer: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, expert: Any, asked: TextInterface, prompts: Sequence[list[int]], longest: int
    ) -> Answers:
        """What an expert answers.

        Args:
            expert: the model.
            asked: how it is asked.
            prompts: tokens.
            longest: tokens of an answer.
        """
        rows: list[tuple[list[int], list[int]]] = []
        for length in sorted({len(prompt) for prompt in prompts}):
            same = [prompt for prompt in prompts if len(prompt) == length]
            written = greedy(expert, same, longest, asked.ends, expert.device)
            rows += zip(same, written, strict=True)
        width = max(len(prompt) + len(written) for prompt, written in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        answer = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (prompt, written) in enumerate(rows):
            ids[i, : len(prompt) + len(written)] = torch.tensor(prompt + written)
            answer[i, len(prompt) - 1 : len(prompt) + len(written) - 1] = True
        return cls(ids, answer, _logprobs(expert, ids, answer))


def _logprobs(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    found = []
    for some, where in zip(ids.split(64), answer.split(64), strict=True):
        logits = model(input_ids=some.to(model.device), use_cache=False).logits
        found.append(logits.cpu().float()[where].log_softmax(-1))
    return torch.cat(found)


@torch.no_grad()
def criteria(model: Any, expected: Answers) -> Row:
    """Everything that one forward pass says of how close a model is to an expert.

    Returns:
        `DIVERGENCES` in nats and `SHARES`; of the answers that are not reproduced: which part of
        them parts at the ``first`` token, at the ``end`` or ``between``, and how many tokens of one
        are other than the expert's along the expert's own answer (``slips``).
    """
    ours, theirs = _logprobs(model, expected.ids, expected.answer), expected.logprobs
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    counts = expected.answer.sum(1)
    tokens = expected.ids[:, 1:][expected.answer[:, :-1]]
    right = ours.argmax(-1) == tokens
    logp = ours.gather(-1, tokens[:, None])[:, 0]
    parts = [t.split(counts.tolist()) for t in (divergence, right, logp)]
    by_prompt = list(zip(*parts, strict=True))
    kls = torch.stack([kl.mean() for kl, _, _ in by_prompt])
    wrong = [ok for _, ok, _ in by_prompt if not ok.all()]
    firsts = [int((~ok).nonzero()[0]) for ok in wrong]

    def mean(values: Iterable[torch.Tensor | float | bool]) -> float:
        return float(np.mean([float(value) for value in values]))

    return {
        "kl": mean(kls),
        "first token": mean(kl[0] for kl, _, _ in by_prompt),
        "end": mean(kl[-1] for kl, _, _ in by_prompt),
        "worst token": mean(kl.max() for kl, _, _ in by_prompt),
        "whole answer": mean(kl.sum() for kl, _, _ in by_prompt),
        "log of kl": -mean((kls + _SMALLEST).log()),
        "top-1": mean(ok.float().mean() for _, ok, _ in by_prompt),
        "probability": mean(lp.sum().exp() for _, _, lp in by_prompt),
        "answers": mean(ok.all() for _, ok, _ in by_prompt),
        "length": mean(counts),
        "parted": {
            "first": mean(at == 0 for at in firsts) if wrong else 0.0,
            "end": mean(at == len(ok) - 1 for at, ok in zip(firsts, wrong, strict=True))
            if wrong
            else 0.0,
            "slips": mean((~ok).sum() for ok in wrong) if wrong else 0.0,
        },
    }


@dataclass(frozen=True)
class Merge:
    """A merge to be made.

    Attributes:
        name: with its parameters.
        kind: "ours" or "peer".
        make: loads it, while the context lasts.
    """

    name: str
    kind: str
    make: Callable[[], AbstractContextManager[Any]]


class Journal:
    """What was measured, a line for each merge and skill; a killed run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = read_jsonl(path) if path.exists() else []

    def measure(self, group: str, merge: Merge, measured: Callable[[Any], dict[str, Row]]) -> None:
        """Measure a merge, unless it was.

        Args:
            group: of the merges that are ranked together: a training seed and a combination.
            merge: which.
            measured: of a model, by skill.
        """
        if any((row["group"], row["merge"]) == (group, merge.name) for row in self.rows):
            return
        with merge.make() as model:
            found = measured(model)
        same = {"group": group, "merge": merge.name, "kind": merge.kind}
        rows = [same | {"skill": skill} | row for skill, row in found.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


@dataclass(frozen=True)
class Measured:
    """The merges of all groups; each row beside its group's base.

    Attributes:
        rows: of merges.
        bases: rows by group and skill.
    """

    rows: list[Row]
    bases: dict[tuple[str, str], Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Measured:
        """Sort the bases out."""
        bases = {(row["group"], row["skill"]): row for row in rows if row["kind"] == "base"}
        return cls([row for row in rows if row["kind"] in ("ours", "peer")], bases)

    @property
    def skills(self) -> list[str]:
        """Names, as they come."""
        return list(dict.fromkeys(row["skill"] for row in self.rows))

    def value(self, row: Row, criterion: str) -> float:
        """A criterion of a row: of divergences the part recovered, 1 at the expert."""
        if criterion not in DIVERGENCES:
            return float(row[criterion])
        return 1 - row[criterion] / self.bases[row["group"], row["skill"]][criterion]

    def rank(self, criterion: str, rows: Sequence[Row]) -> float:
        """Spearman's correlation with accuracy, mean over groups; NaN where nothing varies."""
        found = []
        for group in dict.fromkeys(row["group"] for row in rows):
            own = [row for row in rows if row["group"] == group]
            accuracy = [row["accuracy"] for row in own]
            values = [self.value(row, criterion) for row in own]
            if len(own) > 4 and len(set(accuracy)) > 1 and len(set(values)) > 1:
                found.append(float(spearmanr(values, accuracy)[0]))
        return float(np.mean(found)) if found else float("nan")

    def misses(self, criterion: str, rows: Sequence[Row]) -> float:
        """Accuracy that is lost by choosing, in every group, what the criterion puts first."""
        lost = []
        for group in dict.fromkeys(row["group"] for row in rows):
            own = [row for row in rows if row["group"] == group]
            chosen = max(own, key=lambda row: self.value(row, criterion))
            lost.append(max(row["accuracy"] for row in own) - chosen["accuracy"])
        return float(np.mean(lost))


def ranking(found: Measured) -> str:
    """Which criterion ranks merges as their answers do: by skill, and among the good alone."""
    skills = found.skills
    good = [row for row in found.rows if found.value(row, "kl") >= EDGES[3]]
    head = [*skills, "mean", f"mean, kl from {EDGES[3]} on", "lost by the choice"]
    lines = [f"| criterion | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for criterion in (*DIVERGENCES, *SHARES):
        by_skill = [
            found.rank(criterion, [row for row in found.rows if row["skill"] == skill])
            for skill in skills
        ]
        among = [found.rank(criterion, [r for r in good if r["skill"] == s]) for s in skills]
        lost = [found.misses(criterion, [r for r in found.rows if r["skill"] == s]) for s in skills]
        known = [value for value in among if not np.isnan(value)]
        cells = [*by_skill, np.mean(by_skill), np.mean(known or [np.nan]), np.mean(lost)]
        said = ["" if np.isnan(cell) else f"{cell:.2f}" for cell in cells]
        lines.append(f"| {criterion} | {' | '.join(said)} |")
    return "\n".join(lines)


def bins(found: Measured) -> str:
    """Accuracy by recovered kl: 10th, 50th and 90th percentile of the merges of a bin."""
    skills = found.skills
    lines = [f"| recovered kl | {' | '.join(skills)} |", "|---|" + "---:|" * len(skills)]
    for low, high in pairwise(EDGES):
        cells = []
        for skill in skills:
            own = [
                row["accuracy"]
                for row in found.rows
                if row["skill"] == skill and low <= found.value(row, "kl") < high
            ]
            said = "{:.2f} {:.2f} {:.2f}".format(*np.quantile(own, [0.1, 0.5, 0.9])) if own else ""
            cells.append(f"{said} ({len(own)})")
        name = f"under {high:g}" if np.isinf(low) else f"{low:g} to {min(high, 1):g}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def partings(found: Measured) -> str:
    """Where answers part from the expert's, of merges that recover much of the kl."""
    head = ["merges", "tokens an answer", "answers", "top-1", "at the first", "at the end", "slips"]
    lines = [f"| skill | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for skill in found.skills:
        own = [
            row
            for row in found.rows
            if row["skill"] == skill and found.value(row, "kl") >= EDGES[2] and row["answers"] < 1
        ]
        if not own:
            continue
        parted = [row["parted"] for row in own]
        cells = [np.mean([row[key] for row in own]) for key in ("length", "answers", "top-1")] + [
            np.mean([part[key] for part in parted]) for key in ("first", "end", "slips")
        ]
        said = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {skill} | {len(own)} | {said} |")
    return "\n".join(lines)


def picture(found: Measured, criteria_shown: Sequence[str] = ("kl", "answers")) -> Figure:
    """Accuracy over each criterion, a panel a skill; ours and peers told apart."""
    skills = found.skills
    shape = (len(criteria_shown), len(skills))
    figure = Figure(figsize=(2.6 * shape[1] + 0.6, 2.3 * shape[0] + 0.5), layout="constrained")
    axes = figure.subplots(*shape, sharey=True, squeeze=False)
    for line, criterion in zip(axes, criteria_shown, strict=True):
        for ax, skill in zip(line, skills, strict=True):
            for kind, colour, mark in (("peer", "#E69F00", "o"), ("ours", "#0072B2", "^")):
                own = [r for r in found.rows if r["skill"] == skill and r["kind"] == kind]
                x = [max(found.value(row, criterion), -0.5) for row in own]
                y = [row["accuracy"] for row in own]
                ax.scatter(x, y, s=9, c=colour, marker=mark, alpha=0.45, lw=0, label=kind)
            recovered = criterion in DIVERGENCES
            said = f"{criterion} recovered" if recovered else f"{criterion} reproduced"
            ax.set_xlabel(said)
            ax.set_title(skill, fontsize=10)
            ax.set_xlim(-0.55 if recovered else -0.05, 1.05)
            ax.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("test items right")
    axes[0][0].legend(frameon=False, loc="upper left")
    return figure
