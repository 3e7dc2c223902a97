"""The text of ``mergekit-wp inspect``: a summary, then the leaders; plain, for pipes too.

And tables for pandas.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_wp.criteria import criterion_words
from mergekit_wp.errors import UserError
from mergekit_wp.files.manifest import Manifest
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import fit_history, mechanism, weights_vs_activations, words
from mergekit_wp.report.ranking import (
    RankedComponent,
    Selection,
    leaders,
    select,
    stable_leaders,
)
from mergekit_wp.report.request import LEADING
from mergekit_wp.report.verification import sentences
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand

_WIDTH = 80


def render(
    score_file: ScoreFile, selection: Selection, top: int, *, width: int | None = None
) -> Iterator[str]:
    """Lines of the table.

    Args:
        score_file: a checked score file.
        selection: which scores to show.
        top: leaders for each estimand and criterion.
        width: of the terminal, to shorten tensor names to; None prints them whole.
    """
    manifest = score_file.manifest
    yield f"behaviour: {words.clean(manifest.behavior)}"
    yield from _list([*words.identity(manifest), *fit_history.facts(manifest)])
    yield ""
    yield "criteria, scaled to 0 at the base and 1 at the expert"
    for c in selection.criteria:
        yield from _list([(c, criterion_words(c)), (c, words.criterion_facts(manifest, c))])
    for estimand, criterion in selection.pairs:
        yield ""
        yield from _heading(f"{estimand}/{criterion}")
        yield from _list(_facts(score_file, selection, estimand, criterion))
        lists = leaders(score_file, estimand, criterion, selection.kinds, top, selection.stable)
        yield from _list([(f"top {x.title}", _in_line(x.rows)) for x in lists if x.aside])
        for listed in lists:
            if not listed.aside:
                yield ""
                yield from _rows(listed.rows, manifest, width)
    if selection == select(score_file):  # nothing was filtered out
        yield from _sides(score_file)


def _sides(score_file: ScoreFile) -> Iterator[str]:
    """Weights against activations, where both are scored."""
    for found in weights_vs_activations.comparisons(score_file):
        yield ""
        yield from _heading(f"{found.weights} against {found.activations}, {found.criterion}")
        yield from _list([("", sentence) for sentence in weights_vs_activations.sentences(found)])


def _heading(text: str) -> Iterator[str]:
    yield text
    yield "-" * len(text)


def _facts(
    score_file: ScoreFile, selection: Selection, estimand: Estimand, criterion: CriterionName
) -> list[tuple[str, str]]:
    facts = [("score", words.ESTIMAND_WORDS[estimand])]
    if estimand == "share":
        facts.append(("sum", words.share_words(score_file, criterion)))
    if set(score_file.manifest.kinds) & {"tensor", *SLICED_KINDS}:
        facts.append(("spread", words.portrait(score_file, estimand, criterion).spread))
    rows = words.fidelity_rows(score_file.manifest, estimand, criterion, selection.kinds)
    facts += [("method", f"{', '.join(row.kinds)}: {row.words}") for row in rows]
    if any(row.fidelity is not None and row.fidelity.swapped for row in rows):
        facts.append(("method", "scores marked ~ are estimates, all others those of exact swaps"))
    facts += [
        ("stability", mechanism.agreement_sentence(group))
        for group in mechanism.agreement_groups(score_file.manifest.stability, estimand, criterion)
    ]
    if often := stable_leaders(score_file, estimand, criterion, selection.kinds):
        said = ", ".join(f"of {words.KIND_WORDS[kind]} {n:,}" for kind, n in often.items())
        facts.append(("leaders", f"in at least {LEADING:.0%} of draws over the prompts: {said}"))
    verified = score_file.manifest.verification
    if verified and (verified.estimand, verified.criterion) == (estimand, criterion):
        facts += [("together", sentence) for sentence in sentences(verified)]
    return facts


def _list(items: Sequence[tuple[str, str]]) -> Iterator[str]:
    last = None
    for label, text in items:
        head = f"  {'' if label == last else label:<12}"
        last = label
        yield from textwrap.wrap(
            text, _WIDTH, initial_indent=head, subsequent_indent=" " * 14, break_on_hyphens=False
        )


def _in_line(rows: list[RankedComponent]) -> str:
    score = ScoreFormat([row.score for row in rows])
    return ", ".join(f"{words.clean(row.name)} {score(row.score)}" for row in rows)


def _estimated(rows: Sequence[RankedComponent], manifest: Manifest) -> Iterator[bool]:
    """Whether each score is an estimate, in a file that has exact ones of the same scores."""
    swapped = {key: set(f.swapped) for key, f in manifest.fidelity.items() if f.swapped is not None}
    for row in rows:
        exact = swapped.get(f"{row.estimand}/{row.criterion}/{row.kind}")
        if exact is None or row.layer is None:
            yield False
        else:
            yield row.layer * manifest.shape(row.kind)[1] + row.index not in exact


def _rows(rows: list[RankedComponent], manifest: Manifest, width: int | None) -> Iterator[str]:
    if not rows:
        yield "  no components"
        return
    score = ScoreFormat([row.score for row in rows])
    cells: list[tuple[str, ...]] = [
        (
            str(number),
            row.kind,
            "-" if row.layer is None else str(row.layer),
            str(row.index),
            ("~" if estimated else "") + score(row.score),
            "" if row.se is None else score(row.se, sign=""),
            words.clean(row.name),
        )
        for number, (row, estimated) in enumerate(
            zip(rows, _estimated(rows, manifest), strict=True), 1
        )
    ]
    table: list[tuple[str, ...]] = [
        ("#", "kind", "layer", "index", "score", "± se", "name"),
        *cells,
    ]
    if all(row.se is None for row in rows):
        table = [line[:5] + line[6:] for line in table]
    widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[:-1]]
    for line in table:
        padded = [
            cell.ljust(size) if place == 1 else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(line, widths, strict=False))
        ]
        before = "  ".join(padded) + "  "
        yield before + _shorten(line[-1], None if width is None else width - len(before))


def _shorten(name: str, room: int | None) -> str:
    """Drop the start of a name, which the other columns repeat."""
    if room is None or len(name) <= room:
        return name
    return "…" + name[len(name) - max(room - 1, 8) :]


class ScoreFormat:
    """Writes scores with as many decimals as the largest needs for three figures."""

    def __init__(self, scores: Sequence[float]) -> None:
        """Fix the decimals for these scores."""
        largest = max((abs(score) for score in scores), default=0.0)
        self.scientific = 0 < largest < 1e-7 or largest >= 1e6
        magnitude = math.floor(math.log10(largest)) if largest > 0 else 0
        self.decimals = min(max(2 - magnitude, 3), 10)

    def __call__(self, score: float, sign: str = "+") -> str:
        """One score."""
        score += 0.0  # no minus zero
        return f"{score:{sign}.3e}" if self.scientific else f"{score:{sign}.{self.decimals}f}"


def frame(records: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas frame with a row for each record, and its keys as columns.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError(
            "a frame needs pandas, which is not installed: pip install 'mergekit-wp[frame]'"
        ) from error
    return pandas.DataFrame.from_records(list(records))
