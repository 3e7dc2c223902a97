"""The HTML page of a score file: one file that opens offline, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from markupsafe import Markup

from mergekit_wp.criteria import criterion_words
from mergekit_wp.errors import UserError, option
from mergekit_wp.files import circuitfile
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.manifest import Manifest, Verification
from mergekit_wp.files.scorefile import ScoreFile, read
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.model_names import last_name
from mergekit_wp.report import (
    circuit_graph,
    fit_history,
    mechanism,
    merge_preview,
    summary,
    weights_vs_activations,
    words,
)
from mergekit_wp.report.figures import Drawing, draw_panel, drawing, panel_list, png
from mergekit_wp.report.html import filled
from mergekit_wp.report.ranking import Leaders, leaders, select
from mergekit_wp.report.table import ScoreFormat
from mergekit_wp.report.verification import DIRECTIONS, draw, measures, sentences
from mergekit_wp.terms import SLICED_KINDS, CriterionName, Estimand, Kind

_LEADERS = 20
_CURVES, _SCATTER = (5.2, 3.0), (3.8, 3.0)
_EMPTY = ("", "–")
_CORRELATIONS = ("Pearson", "Spearman", "Pearson, random")
#: along which the first picture goes
_PICTURED: dict[Kind, str] = {
    "tensor": "layer and matrix",
    "head": "layer and head",
    "kv_group": "layer and K/V group",
    "neuron": "layer, neurons counted",
    "layer": "layer",
}


@dataclass(frozen=True)
class PageTable:
    """A table of text; columns from ``numbers`` on are aligned to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int

    @classmethod
    def of(
        cls, title: str, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int
    ) -> list[PageTable]:
        """The table without columns that say nothing; none where no row is left."""
        every = list(rows)
        kept = [
            i for i in range(len(head)) if i < numbers or any(row[i] not in _EMPTY for row in every)
        ]
        if not every or len(kept) == numbers:
            return []
        lines = [[row[i] for i in kept] for row in every]
        return [cls(title, [head[i] for i in kept], lines, numbers)]


@dataclass(frozen=True)
class PageSection:
    """One section: sentences, figures and tables."""

    id: str
    title: str
    sentences: list[str]
    figures: list[Drawing] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    code: str = ""


def html(score_file: ScoreFile, trace: TraceFile | None = None) -> str:
    """The page, self-contained: styles and figures inline, no script, no address.

    Args:
        score_file: a checked score file.
        trace: of the same scores, to draw the circuit from.
    """
    manifest = score_file.manifest
    selection = select(score_file)
    scores = [_scores(score_file, e, c) for e, c in selection.pairs]
    return filled(
        "page.html",
        behavior=words.clean(manifest.behavior),
        expert=words.clean(last_name(manifest.expert.reference)),
        base=words.clean(last_name(manifest.base.reference)),
        verdict=summary.verdict(score_file),
        picture=_picture(score_file),
        sections=[
            *_merge_preview(score_file),
            *_fit(score_file),
            *scores,
            *_sides(score_file),
            *_circuit(trace),
            *_stability(score_file),
            _fidelity(score_file),
        ],
        identity=words.identity(manifest),
        criteria=[
            (c, criterion_words(c), words.criterion_facts(manifest, c)) for c in selection.criteria
        ],
        estimands=[(e, words.ESTIMAND_WORDS[e]) for e in selection.estimands],
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
    scores = read(local_path(str(file)))
    circuit = None if trace is None else circuitfile.read(trace, scores)
    content = png(scores) if ending == ".png" else html(scores, circuit).encode()
    with written_whole(out) as temporary:
        temporary.write_bytes(content)


def _picture(score_file: ScoreFile) -> Drawing | None:
    """What the page shows first: whole tensors, of which everybody knows where they are."""
    manifest = score_file.manifest
    estimand = manifest.estimands[0]
    found = {p.kind: p for p in panel_list(score_file, estimand, manifest.criteria[0])}
    panel = next((found[kind] for kind in ("tensor", *found) if kind in found), None)
    if panel is None:
        return None
    what = "How much of the expert a merge takes" if estimand == "path" else "Where it sits"
    title = f"{what}, by {_PICTURED[panel.kind]}"
    return drawing(title, panel.alt, partial(draw_panel, panel), "picture", _panel_size(manifest))


def _panel_size(manifest: Manifest) -> tuple[float, float]:
    return (3.8, min(max(0.09 * manifest.n_layers, 1.6), 6.0) + 1.2)


def _scores(score_file: ScoreFile, estimand: Estimand, criterion: CriterionName) -> PageSection:
    """Everything about one estimand and criterion."""
    manifest, name = score_file.manifest, f"{estimand}-{criterion}"
    size = _panel_size(manifest)
    figures = [
        drawing(panel.title, panel.alt, partial(draw_panel, panel), f"{name}-{panel.kind}", size)
        for panel in panel_list(score_file, estimand, criterion)
    ]
    said = [words.portrait(score_file, estimand, criterion).spread]
    if estimand == "share":
        said.insert(0, words.share_words(score_file, criterion))
    verified = manifest.verification
    if verified and (verified.estimand, verified.criterion) == (estimand, criterion):
        figures += _curves(verified)
        said += sentences(verified)
    kinds = select(score_file).kinds
    listed = leaders(score_file, estimand, criterion, kinds, _LEADERS)
    tables = [table for each in listed for table in _leaders(each)]
    title = "Gates" if estimand == "path" else f"Scores by {estimand}/{criterion}"
    return PageSection(name, title, said, figures, tables)


def _leaders(listed: Leaders) -> list[PageTable]:
    """Nothing where all have one score: the list would say how they are numbered."""
    score = ScoreFormat([row.score for row in listed.rows])
    if len({score(row.score) for row in listed.rows}) == 1 < len(listed.rows):
        return []
    rows = [
        # a long name may be broken at its dots
        (
            Markup(".<wbr>").join(row.name.split(".")),
            score(row.score),
            "" if row.se is None else score(row.se, sign=""),
        )
        for row in listed.rows
    ]
    return PageTable.of(f"Leading {listed.title}", ("name", "score", "± se"), rows, 1)


def _curves(found: Verification) -> list[Drawing]:
    """What the leading components do together; the numbers stand in the alternative text."""
    return [
        drawing(
            f"{direction.capitalize()} of {measure} by sets of components",
            "; ".join(sentences(found)),
            partial(draw, found, direction, measure),
            f"{direction}-{measure}",
            _CURVES,
        )
        for measure in measures(found)
        for direction in DIRECTIONS
    ]


def _sides(score_file: ScoreFile) -> Iterator[PageSection]:
    """Weights against activations."""
    for found in weights_vs_activations.comparisons(score_file):
        name = f"{found.weights}-{found.activations}-{found.criterion}"
        said = weights_vs_activations.sentences(found)
        figures = [
            drawing(
                f"{words.KIND_WORDS[kind]}: {found.weights} and {found.activations}",
                f"Scatter of {words.KIND_WORDS[kind]}: {'; '.join(said)}",
                partial(weights_vs_activations.draw, score_file, found, kind),
                f"{name}-{kind}",
                _SCATTER,
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
            if row.spearman is not None or row.overlap is not None
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
        what = (
            "a component that is important by its activations, and not by its weights, passes on "
            "what others supply; high is the top 5% of a kind, low is outside its top 20%"
        )
        title = f"Weights against activations: {found.weights}/{found.criterion}"
        tables = PageTable.of("By kind and depth", head, rows, 2)
        yield PageSection(name, title, [what, *said], figures, tables)


def _circuit(trace: TraceFile | None) -> Iterator[PageSection]:
    """Who supplies whom."""
    if trace is None:
        return
    said = mechanism.circuit_sentences(trace)
    figure = drawing(
        "Suppliers below, what they supply above",
        f"Layered graph; {'; '.join(said)}",
        partial(circuit_graph.draw, trace),
        "circuit",
        circuit_graph.size(trace),
    )
    edges = mechanism.edge_rows(trace, circuit_graph.MOST_EDGES)
    tables = [
        *PageTable.of("Components", mechanism.NODES, mechanism.node_rows(trace), 2),
        *PageTable.of("Edges", mechanism.EDGES, edges, 3),
    ]
    yield PageSection("circuit", "Circuit: who supplies whom", said, [figure], tables)


def _fit(score_file: ScoreFile) -> Iterator[PageSection]:
    """How many of the experts' answers the merge gave, step by step."""
    said = [f"{label}: {text}" for label, text in fit_history.facts(score_file.manifest)]
    if said:
        fit, alt = score_file.manifest.fit, "; ".join(said)
        draw = partial(fit_history.draw, score_file.manifest)
        figures = [drawing("Answers reproduced by step", alt, draw, "fit", _CURVES)]
        if fit is not None and fit.front:
            draw = partial(fit_history.draw_front, score_file.manifest)
            figures.append(drawing("Answers reproduced by limit", alt, draw, "front", _CURVES))
        yield PageSection("fit", "How the fit went", said, figures)


def _stability(score_file: ScoreFile) -> Iterator[PageSection]:
    """How much of the ranking is the prompts' accident."""
    if found := score_file.manifest.stability:
        what = (
            "rank correlation over all components of a kind with a 95% interval, and the Jaccard "
            "overlap of the leaders; halves say how much of the order is the prompts' accident, "
            "and no ranking agrees with another one better than with itself"
        )
        rows = mechanism.agreement_rows(found)
        tables = PageTable.of("Agreement", mechanism.AGREEMENT, rows, 3)
        yield PageSection("stability", "Stability of the ranking", [what], tables=tables)


def _merge_preview(score_file: ScoreFile) -> Iterator[PageSection]:
    """What a merge would take from the file."""
    found = merge_preview.merge_preview(score_file)
    if found is None:
        return
    figures = []
    if found.by_layer and found.estimand != "path":  # sums of gates say how many neurons there are
        alt = f"Stacked bars of positive {found.estimand} of each layer by kind"
        draw = partial(merge_preview.draw, found)
        figures.append(drawing("Where it lies", alt, draw, "merge", (5.2, 3.0)))
    code = merge_preview.recipe(score_file, found)
    said = merge_preview.sentences(found)
    yield PageSection("merge", "What a merge would take from it", said, figures, code=code)


def _fidelity(score_file: ScoreFile) -> PageSection:
    """How scores were computed, and what exact swaps say of estimates."""
    selection = select(score_file)
    rows = []
    checked = False
    for estimand, criterion in selection.pairs:
        for row in words.fidelity_rows(score_file.manifest, estimand, criterion, selection.kinds):
            f = row.fidelity
            numbers = () if f is None else (f.pearson, f.spearman, f.pearson_random)
            swaps = 0 if f is None else f.verified_top + f.verified_random
            found = () if f is None else (f.largest_missed, f.largest_error, f.bound)
            checked = checked or swaps > 0
            rows.append(
                (
                    f"{estimand}/{criterion}",
                    ", ".join(words.KIND_WORDS[kind] for kind in row.kinds),
                    "not recorded" if f is None else words.method_words(f),
                    f"{swaps}" if swaps else "–",
                    *("–" if value is None else f"{value:.3f}" for value in numbers),
                    *("–",) * (3 - len(numbers)),
                    *("–" if value is None else f"{value:.2g}" for value in found),
                    *("–",) * (3 - len(found)),
                )
            )
    head = ("scores", "kinds", "method", "checked", *_CORRELATIONS, "missed", "error", "others")
    said = []
    if checked:
        said.append(
            "estimates were checked by exact swaps of leaders and of components drawn at random; "
            "correlations are between the two, and “missed” is the largest exact score among the "
            "random ones that the estimate did not put among the leaders, “error” the largest "
            "difference between the two. What was swapped has its exact score; of the others no "
            "score larger than “others” is expected"
        )
    tables = PageTable.of("Methods", head, rows, 2)
    return PageSection("fidelity", "How far to trust the scores", said, tables=tables)
