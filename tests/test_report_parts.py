"""Parts of the report: what they say about a circuit whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from mergekit_wp.files.circuitfile import TraceFile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.report import (
    circuit_graph,
    mechanism,
    merge_preview,
    summary,
    weights_vs_activations,
)
from tests.circuit import NEURON, write_world
from tests.factory import make_fit, make_score_file
from tests.test_trace import scored, traced

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoreFile, TraceFile]:
    """The hand-built circuit with a changed neuron: its scores and its trace."""
    root: Path = write_world(tmp_path_factory.mktemp("parts"), NEURON)
    return scored(root, "gain", "activation_gain"), traced(root)


def test_sides_tell_sources_from_what_passes_on(world: tuple[ScoreFile, TraceFile]) -> None:
    [found] = weights_vs_activations.comparisons(world[0])
    assert (found.weights, found.activations) == ("gain", "activation_gain")
    assert set(found.activations_only) == {"layer 1 head 2", "layer 3 neuron 5"} | {
        "layer 1 kv_group 1"
    }
    assert not found.weights_only
    rows = {(row.kind, row.depth): row for row in found.rows}
    assert rows["head", "all layers"].activations_only == 1
    assert rows["head", "early third"].activations_only == 1  # layers 0 and 1 of four
    assert rows["head", "late third"].activations_only == 0
    assert rows["neuron", "all layers"].n == 48
    # the two leading neurons by activations are the source and the executor, one of them by both
    assert rows["neuron", "all layers"].overlap == pytest.approx(0.5)
    assert any("by activations only" in said for said in weights_vs_activations.sentences(found))


def test_top() -> None:
    scores = np.array([[0.5, -1.0], [0.7, 0.0]])
    assert weights_vs_activations.top(scores, 0.25).tolist() == [[False, False], [True, False]]
    assert weights_vs_activations.top(scores, 1.0).tolist() == [[True, False], [True, False]], (
        "above zero only"
    )
    assert not weights_vs_activations.top(np.zeros((2, 2)), 0.5).any()


def test_circuit_stands_in_layers(world: tuple[ScoreFile, TraceFile]) -> None:
    trace = world[1]
    at = circuit_graph.positions(trace)
    order = ["layer 0 neuron 3", "layer 1 head 2", "layer 3 neuron 5"]
    assert [at[name][1] for name in order] == sorted(at[name][1] for name in order)
    for edge in circuit_graph.drawn_edges(trace):
        assert at[edge.source][1] < at[edge.target][1] or edge.target.startswith(
            edge.source.rsplit(" ", 2)[0]
        )
    said = " ".join(mechanism.circuit_sentences(trace))
    assert "1 carrier (holds the change in its weights and supplies others): layer 0" in said
    rows = {row[0]: row for row in mechanism.node_rows(trace)}
    assert (rows["layer 1 head 2"][1], rows["layer 1 head 2"][-1]) == ("router", "1")


def test_arrowheads_touch_no_label(world: tuple[ScoreFile, TraceFile]) -> None:
    trace = world[1]
    figure = Figure(figsize=circuit_graph.size(trace), layout="constrained")
    ax = figure.add_subplot()
    circuit_graph.draw(trace, ax)
    figure.draw_without_rendering()
    labels = [text for text in ax.texts if text.get_text()]
    arrows = [text.arrow_patch for text in ax.texts if isinstance(text, Annotation)]
    assert len(labels) == len(circuit_graph.positions(trace))
    assert len(arrows) == len(circuit_graph.drawn_edges(trace)) > 0
    for arrow in arrows:
        assert arrow is not None
        path = arrow.get_path()  # in pixels: a line, then the head, which is closed
        head = path.vertices[np.flatnonzero(path.codes == path.MOVETO)[-1] : -1]
        assert len(head) == 3
        for label in labels:
            frame = label.get_bbox_patch()
            assert frame is not None
            assert not any(frame.get_window_extent().contains(*point) for point in head)


def test_verdict_names_the_source(world: tuple[ScoreFile, TraceFile]) -> None:
    where, what, trust = summary.verdict(world[0])
    assert where.endswith("components (1.2%), most of it in the early layers (100%).")
    assert "needs layer 0 neuron 3" in what
    assert trust.startswith("Each score is of one component alone")


def test_verdict_says_what_is_wrong_with_a_score_file() -> None:
    file = make_score_file(estimands=("share",))
    where, what, _ = summary.verdict(
        ScoreFile(file.manifest, {k: -v.abs() for k, v in file.tensors.items()})
    )
    assert "are base and expert swapped" in where and "leaves the base as it is" in what
    for total, words in (
        (0.43, "score again with more --share-steps"),
        (1.04, "a merge can go by"),
    ):
        said = {"completeness": {"share/kl": total}}
        stated = ScoreFile(file.manifest.model_copy(update=said), file.tensors)
        assert words in summary.verdict(stated)[2] and f"{total:.2f}" in summary.verdict(stated)[2]
    only = make_score_file(estimands=("share",), kinds=("layer",))
    assert "whole layers only" in summary.verdict(only)[0]


def test_verdict_of_a_fit_says_what_comes_back_and_what_it_costs() -> None:
    fit, company = make_fit("one", "two")
    file = make_score_file(estimands=("path",), company=company, fit=fit)
    file = ScoreFile(file.manifest.model_copy(update={"behavior": "behavior 0"}), file.tensors)
    returns, taken, cost = summary.verdict(file)
    assert "gives 50% of the expert's own answers on the prompts it was fitted on to the" in returns
    assert "and 75% of their tokens" in returns
    assert returns.endswith(
        "(behavior 1 0.50 and 0.75); give more prompts, or fewer experts. "
        "Other words may be right, too: 'mergekit-wp compare' measures the skill itself."
    )
    assert "something of" in taken
    assert "plain is at 1.010 times the base's perplexity, within the limit of 1.05" in cost
    own = fit.guards[0].model_copy(update={"limit": 1.001})
    for guard, flag in ((own, "--limit-of"), (own.model_copy(update={"limit": None}), "--limit")):
        beyond = fit.model_copy(update={"guards": (guard,), "limit": 1.001})
        harmed = ScoreFile(file.manifest.model_copy(update={"fit": beyond}), file.tensors)
        said = "beyond the limit of 1.001; give more --steps, or a larger "
        assert summary.verdict(harmed)[2].endswith(f"{said}{flag}.")
    unguarded = fit.model_copy(update={"guards": (), "limit": None})
    alone = ScoreFile(file.manifest.model_copy(update={"fit": unguarded}), file.tensors)
    assert summary.verdict(alone)[2].startswith("Nothing was guarded")


def test_takings_count_what_scores_above_zero(world: tuple[ScoreFile, TraceFile]) -> None:
    file = world[0]
    found = merge_preview.merge_preview(file)
    assert found is not None and (found.estimand, found.criterion) == ("gain", "kl")
    for kind in ("head", "kv_group", "neuron"):
        scores = file.scores("gain", "kl", kind)
        assert found.taken[kind] == (int((scores > 0).sum()), scores.numel())  # type: ignore[index]
    assert found.leading > 0.99, "one neuron is the whole change"
    assert sum(found.by_layer["neuron"]) == pytest.approx(1, abs=1e-3)
    only = ScoreFile(
        file.manifest.model_copy(update={"estimands": ("activation_gain",)}), file.tensors
    )
    assert merge_preview.merge_preview(only) is None, "no merge goes by activations"
