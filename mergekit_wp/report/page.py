"""The HTML page of a score file: one file that opens offline, on a phone, in the dark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jinja2
from markupsafe import Markup

from mergekit_wp.report import words
from mergekit_wp.report.figures import page_svg, panel_list, svg
from mergekit_wp.report.ranking import Leaders, Row, leaders, select
from mergekit_wp.report.table import ScoreFormat
from mergekit_wp.report.verification import DIRECTIONS, draw, measures, sentences
from mergekit_wp.scorefile import CriterionName, Estimand, ScoreFile, Verification

_LEADERS = 20


@dataclass(frozen=True)
class _Table:
    """Leading components, with scores as text."""

    title: str
    rows: list[tuple[Row, str, str]]
    aside: bool


@dataclass(frozen=True)
class _Figure:
    """An inline SVG with its caption and the text that stands for it."""

    title: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class _Section:
    """Everything about one estimand and criterion."""

    estimand: Estimand
    criterion: CriterionName
    summary: list[str]
    figures: list[_Figure]
    tables: list[_Table]


def html(score_file: ScoreFile) -> str:
    """The page, self-contained: styles and figures inline, no script, no address."""
    manifest = score_file.manifest
    selection = select(score_file)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mergekit_wp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        behavior=words.clean(manifest.behavior),
        identity=words.identity(manifest),
        criteria=[
            (c, words.CRITERION_WORDS[c], words.criterion_facts(manifest, c))
            for c in selection.criteria
        ],
        estimands=[(e, words.ESTIMAND_WORDS[e]) for e in selection.estimands],
        fidelity=[
            row
            for e, c in selection.pairs
            for row in words.fidelity_rows(manifest, e, c, selection.kinds)
        ],
        kind_words=words.KIND_WORDS,
        methods=words.METHOD_WORDS,
        sections=[_section(score_file, e, c) for e, c in selection.pairs],
        versions=", ".join(words.clean(f"{k} {v}") for k, v in sorted(manifest.versions.items())),
    )


def _section(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> _Section:
    kinds = select(score_file).kinds
    figures = [
        _Figure(
            panel.title,
            panel.alt,
            # nothing in it comes from the file but numbers
            Markup(
                svg(panel, f"{estimand}-{criterion}-{panel.kind}", score_file.manifest.n_layers)
            ),
        )
        for panel in panel_list(score_file, estimand, criterion)
    ]
    verified = score_file.manifest.verification
    if verified and (verified.estimand, verified.criterion) == (estimand, criterion):
        figures += _curves(verified)
    return _Section(
        estimand,
        criterion,
        _summary(score_file, estimand, criterion),
        figures,
        [_table(x) for x in leaders(score_file, estimand, criterion, kinds, _LEADERS)],
    )


def _curves(found: Verification) -> list[_Figure]:
    """What the leading components do together; the numbers stand in the alternative text."""
    return [
        _Figure(
            f"{direction.capitalize()} of {measure} by sets of components",
            "; ".join(sentences(found)),
            Markup(
                page_svg(
                    partial(draw, found, direction, measure), f"{direction}-{measure}", (5.2, 3.0)
                )
            ),
        )
        for measure in measures(found)
        for direction in DIRECTIONS
    ]


def _summary(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> list[str]:
    spread = words.portrait(score_file, estimand, criterion).spread
    return [words.share_words(score_file, criterion), spread] if estimand == "share" else [spread]


def _table(listed: Leaders) -> _Table:
    score = ScoreFormat([row.score for row in listed.rows])
    return _Table(
        f"Leading {listed.title}",
        [
            (row, score(row.score), "" if row.se is None else score(row.se, sign=""))
            for row in listed.rows
        ],
        listed.aside,
    )
