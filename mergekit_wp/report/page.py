"""The HTML page of a score file: one file that opens offline, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

from markupsafe import Markup

from mergekit_wp.criteria import criterion_words
from mergekit_wp.errors import UserError, option
from mergekit_wp.files import circuitfile
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.manifest import Verification
from mergekit_wp.files.scorefile import ScoreFile, read
from mergekit_wp.report import (
    circuit_graph,
    fit_history,
    mechanism,
    summary,
    weights_vs_activations,
    words,
)
from mergekit_wp.report.figures import page_svg, panel_list, png, svg
from mergekit_wp.report.html import filled
from mergekit_wp.report.ranking import Leaders, RankedComponent, leaders, select
from mergekit_wp.report.table import ScoreFormat
from mergekit_wp.report.verification import DIRECTIONS, draw, measures, sentences
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand

_LEADERS = 20


@dataclass(frozen=True)
class _Table:
    """Leading components, with scores as text."""

    title: str
    rows: list[tuple[RankedComponent, str, str]]
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


@dataclass(frozen=True)
class _Part:
    """A section about more than one estimand: sentences, figures, tables of text."""

    id: str
    title: str
    sentences: list[str]
    figures: list[_Figure] = field(default_factory=list)
    tables: list[_Plain] = field(default_factory=list)


@dataclass(frozen=True)
class _Plain:
    """A table of text; columns from ``numbers`` on are aligned to the right."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: int


def html(score_file: ScoreFile, trace: TraceFile | None = None) -> str:
    """The page, self-contained: styles and figures inline, no script, no address.

    Args:
        score_file: a checked score file.
        trace: of the same scores, to draw the circuit from.
    """
    manifest = score_file.manifest
    selection = select(score_file)
    return filled(
        "page.html",
        behavior=words.clean(manifest.behavior),
        summary=summary.sentences(score_file, trace),
        parts=[
            *_sides(score_file),
            *_circuit(trace),
            *_fit(score_file),
            *_stability(score_file),
        ],
        identity=words.identity(manifest),
        criteria=[
            (c, criterion_words(c), words.criterion_facts(manifest, c)) for c in selection.criteria
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


def plot(file: str | Path, out: Path, trace: Path | None) -> None:
    """Draw a score file as a picture or a page; an existing file is replaced.

    Args:
        file: the score file.
        out: a .png or .html.
        trace: what `trace` wrote for the file, for a page.

    Raises:
        UserError: another ending, a trace for a picture, or a file that cannot be read; a trace
            that is not of these scores.
    """
    ending = out.suffix.lower()
    if ending not in (".html", ".png"):
        raise UserError(f"{option('out', out)}: plot writes .html or .png, not '{out.suffix}'")
    if trace is not None and ending != ".html":
        raise UserError(
            f"{option('trace')} is drawn into a page; give {option('out', 'FILE.html')}"
        )
    scores = read(file)
    circuit = None if trace is None else circuitfile.read(trace, scores)
    content = png(scores) if ending == ".png" else html(scores, circuit).encode()
    with written_whole(out) as temporary:
        temporary.write_bytes(content)


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


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _sides(score_file: ScoreFile) -> Iterator[_Part]:
    """Weights against activations."""
    for found in weights_vs_activations.comparisons(score_file):
        name = f"{found.weights}-{found.activations}-{found.criterion}"
        figures = [
            _Figure(
                f"{_upper(words.KIND_WORDS[kind])}: {found.weights} and {found.activations}",
                f"Scatter of {words.KIND_WORDS[kind]}: "
                + "; ".join(weights_vs_activations.sentences(found)),
                Markup(
                    page_svg(
                        partial(weights_vs_activations.draw, score_file, found, kind),
                        f"{name}-{kind}",
                        (3.8, 3.0),
                    )
                ),
            )
            for kind in SLICED_KINDS
            if kind in score_file.manifest.kinds
        ]
        rows = [
            (
                words.KIND_WORDS[row.kind],
                row.depth,
                f"{row.n:,}",
                "–" if row.spearman is None else f"{row.spearman:.2f}",
                "–" if row.overlap is None else f"{row.overlap:.2f}",
                f"{row.weights_only:,}",
                f"{row.activations_only:,}",
            )
            for row in found.rows
        ]
        head = (
            "kind",
            "depth",
            "n",
            "rank correlation",
            "overlap of the top 5%",
            "high by weights only",
            "high by activations only",
        )
        yield _Part(
            name,
            f"Weights against activations: {found.weights}/{found.criterion}",
            [
                "a component that is important by its activations, and not by its weights, passes "
                "on what others supply; high is the top 5% of a kind, low is outside its top 20%",
                *weights_vs_activations.sentences(found),
            ],
            figures,
            [_Plain("By kind and depth", head, rows, 2)],
        )


def _circuit(trace: TraceFile | None) -> Iterator[_Part]:
    """Who supplies whom."""
    if trace is None:
        return
    said = circuit_graph.sentences(trace)
    yield _Part(
        "circuit",
        "Circuit: who supplies whom",
        said,
        [
            _Figure(
                "Suppliers below, what they supply above",
                f"Layered graph; {'; '.join(said)}",
                Markup(
                    page_svg(
                        partial(circuit_graph.draw, trace), "circuit", circuit_graph.size(trace)
                    )
                ),
            )
        ],
        [
            _Plain(
                "Components",
                ("name", "role", "by weights", "by activations", "direct", "suppliers"),
                [astuple(row) for row in circuit_graph.node_rows(trace)],
                2,
            ),
            _Plain("Edges", ("from", "to", "by", "supply"), circuit_graph.edge_rows(trace), 3),
        ],
    )


def _fit(score_file: ScoreFile) -> Iterator[_Part]:
    """How the objective rose."""
    said = [f"{label}: {text}" for label, text in fit_history.facts(score_file.manifest)]
    if not said:
        return
    draw = partial(fit_history.draw, score_file.manifest)
    figure = _Figure("Recovery by step", "; ".join(said), Markup(page_svg(draw, "fit", (5.2, 3.0))))
    yield _Part("fit", "How the fit went", said, [figure])


def _stability(score_file: ScoreFile) -> Iterator[_Part]:
    """How much of the ranking is the prompts' accident."""
    found = score_file.manifest.stability
    if not found:
        return
    rows = [
        (
            mechanism.agreement_label(one),
            f"{one.estimand}/{one.criterion}",
            words.KIND_WORDS[one.kind],
            *mechanism.agreement_cells(one),
        )
        for one in found
    ]
    head = ("against", "scores", "kind", "rank correlation", "overlap of leaders")
    yield _Part(
        "stability",
        "Stability of the ranking",
        [
            "rank correlation over all components of a kind with a 95% interval, and the Jaccard "
            "overlap of the leaders; halves say how much of the order is the prompts' accident, "
            "and no ranking agrees with another one better than with itself"
        ],
        tables=[_Plain("Agreement", head, rows, 3)],
    )


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
