"""The tables over all combinations of a family: means, perplexity, what was lost most."""

from __future__ import annotations

import math
from pathlib import Path

import click
import pytest

from benchmarks import comparisons
from benchmarks.comparisons import Bench, show, tables
from benchmarks.family import Family
from mergekit_wp.comparison.rows import EQUAL, UNTUNED, Comparison, Row

ITEMS = 20


def row(name: str, role: str, right: int, perplexity: float, other: float, **more: float) -> Row:
    scores = {task: [[1.0] * right + [0.0] * (ITEMS - right)] for task in ("a", "b")}
    kept = {"stories": -2.0 - math.log(perplexity), "c": other}
    return Row(name, role, scores=scores, kept=kept, **more)  # type: ignore[arg-type]


def comparison(right: int, ties: float, *, equal: bool) -> Comparison:
    rows = (
        row("base", "base", 0, 1.0, 0.8),
        row("expert a", "expert", 20, 3.0, 0.8),
        row("weight_patching", "ours", right, 1.0, 0.8, valid=0.9),
        row(f"weight_patching{UNTUNED}", "ours", right, 1.0, 0.8),
        row("ties", "peer", 10, ties, 0.6, valid=0.5),
        row("linear", "peer", 8, 1.0, 0.8, valid=0.4),
    )
    kept = {"ties": row(f"ties{EQUAL}", "peer", 4, 1.0, 0.8)} if equal else {}
    return Comparison(rows, ("a", "b"), True, "weight_patching", 1.0, kept)


def read(cells: str) -> list[str]:
    return [cell.strip() for cell in cells.strip("|").split("|")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = {"one": comparison(18, 5.0, equal=True), "two": comparison(20, 3.2, equal=False)}
    monkeypatch.setattr(comparisons, "read_comparison", lambda folder: made[folder.name])
    return Bench([Path("one"), Path("two")])


def test_a_row_has_its_mean_and_what_that_cost(bench: Bench) -> None:
    lines = tables(bench, ["one", "two"]).splitlines()
    head = read(lines[0])
    found = {cells[0]: dict(zip(head, cells, strict=True)) for cells in map(read, lines[2:6])}
    ours, ties = found[f"weight_patching{UNTUNED}"], found["ties"]
    assert (ours["one"], ours["two"]) == ("0.90", "1.00")
    assert ours["mean, 95%"].startswith("0.95 [")
    assert ties["untuned ours minus it"].startswith("+0.45 [+0.")
    assert (ours["perplexity, x base"], ties["perplexity, x base"]) == ("1.00", "4.00")
    assert ties["worst loss"] == "0.80 of stories"
    assert ours["worst loss"].startswith("0.00 of")


def test_equal_perplexity_is_told_only_where_every_combination_has_it(bench: Bench) -> None:
    assert bench.equal("ties") is None
    found = Bench([Path("one")]).equal("ties")
    assert found is not None and found.value == pytest.approx(0.2)


def test_the_best_peer_is_the_hardest_to_beat(bench: Bench) -> None:
    assert bench.best_peer(bench.found) == "ties"


def test_nothing_to_show_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.family.REPO", tmp_path)
    with pytest.raises(click.ClickException, match="run its bench first"):
        show(Family("gemma3", ("a", "b")), "", 32)
