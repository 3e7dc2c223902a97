"""The tables over all combinations of a family: means, perplexity, what was lost most."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from scipy import stats

from benchmarks import comparisons
from benchmarks.comparisons import OURS, Bench, ends, find, show, tables
from benchmarks.family import Family
from benchmarks.fit_table import FitTable
from benchmarks.zoo.bench import main as zoo
from mergekit_wp.comparison.rows import EQUAL, UNTUNED, Comparison, Row, Trial

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


ONE, TWO = comparison(18, 5.0, equal=True), comparison(20, 3.2, equal=False)
TWO_ALONE = Bench({1: {"one": TWO}})


@pytest.fixture
def bench() -> Bench:
    return Bench({0: {"one": ONE, "two": TWO}})


def test_a_row_has_its_mean_and_what_that_cost(bench: Bench) -> None:
    lines = tables(bench).splitlines()
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
    found = Bench({0: {"one": ONE}}).equal("ties")
    assert found is not None and found.value == pytest.approx(0.2)


def test_the_best_peer_is_the_hardest_to_beat(bench: Bench) -> None:
    assert bench.best_peer(bench.labels) == "ties"


def test_training_seeds_are_columns_and_their_spread_is_in_the_interval() -> None:
    bench = Bench({0: {"one": ONE}, 1: {"one": TWO}, 2: {"one": TWO}})
    lines = tables(bench).splitlines()
    assert lines[0] == "Means over: one."
    found = {cells[0]: cells for cells in map(read, lines[4:8])}
    assert found[f"weight_patching{UNTUNED}"][1:4] == ["0.90", "1.00", "1.00"]
    mean = bench.mean(OURS, ["one"])
    items = stats.binom.ppf([0.025, 0.975], 2 * ITEMS, 0.1) / (2 * ITEMS) / 3
    assert mean.value == pytest.approx(0.9 / 3 + 2 / 3)
    assert 1 - mean.low == pytest.approx(items[1], abs=0.01), "of these trainings"
    difference = bench.difference(OURS, "linear", ["one"])
    both = bench.over_trainings(OURS, "linear", ["one"])
    over = stats.ttest_1samp([0.5, 0.6, 0.6], 0).confidence_interval()
    want = math.hypot(both.value - over.low, difference.value - difference.low)
    assert both.value - both.low == pytest.approx(want)
    assert bench.worst(OURS) == pytest.approx(0.9)
    assert "| seed 1 | ties | +0.50" in "\n".join(lines)


def test_choices_at_an_end_are_counted_and_skills_above_their_expert_count_as_it() -> None:
    def tuned(chosen: float) -> Row:
        tried = tuple(Trial({"lambda": x, "density": 1.0}, x) for x in (0.5, 1.0, 1.5))
        return Row("ties", "peer", {"lambda": chosen, "density": 1.0}, trials=tried)

    told = ends({"ties": [tuned(0.5), tuned(1.0), tuned(0.5), tuned(1.5)], "sce": [tuned(1.0)]})
    assert told.endswith("beyond it: ties (lambda 0.5, 2 of 4), ties (lambda 1.5, 1 of 4).")
    assert ends({"sce": [tuned(1.0)]}).endswith("beyond it: none.")
    expert, *others = ONE.rows[1], ONE.rows[0], *ONE.rows[2:]
    weaker = replace(expert, scores={"a": [[1.0] * 9 + [0.0] * 11], "b": expert.scores["b"]})
    bench = Bench({0: {"one": replace(ONE, rows=(others[0], weaker, *others[1:]))}})
    assert bench.mean(OURS, ["one"]).value == pytest.approx((2 + 0.9) / 2)
    assert bench.capped(OURS) == pytest.approx((1 + 0.9) / 2)


def test_the_zoos_tables_are_printed_of_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(zoo, ["--print", "--only", "inst-math-sort"])
    page = (Path(__file__).parents[1] / "benchmarks" / "zoo" / "README.md").read_text()
    rows = [line for line in told.output.splitlines() if line.startswith("| expert_merging |")]
    name, _, *cells = (cell.strip() for cell in rows[0].strip("|").split("|"))
    assert f"| {' | '.join((name, *cells))} |" in page


def test_a_method_of_some_seeds_only_is_left_out_and_told() -> None:
    without = replace(ONE, rows=ONE.rows[:-1])
    bench = Bench({0: {"one": without}, 1: {"one": TWO}})
    assert "linear" not in bench.merges and bench.peers == ["ties"]
    told = tables(bench).partition("not in the table: ")[2]
    mean = TWO_ALONE.mean("linear", ["one"])
    assert told.startswith(f"linear (one, seed 1: 0.40 [{mean.low:.2f}, {mean.high:.2f}]).")
    assert "not in the table" not in tables(TWO_ALONE)


def test_what_is_recorded_is_read_where_nothing_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("family", "fit_table"):
        monkeypatch.setattr(f"benchmarks.{module}.REPO", tmp_path)
    family = Family("toys", ("a", "b"))
    made = family.folder / "compare" / "a-b"
    made.mkdir(parents=True)
    (made / "summary.json").touch()
    monkeypatch.setattr(comparisons, "read_comparison", lambda folder: ONE)
    recorded = find(FitTable(family), record=True)
    (made / "summary.json").unlink()
    assert find(FitTable(family)) == recorded == {"a + b": ONE}


@pytest.mark.parametrize(
    ("seeds", "fits", "only", "said"),
    [
        ((0,), ("",), None, "run its bench first"),
        ((0, 1, 2), ("", "--steps 3"), None, "2 times for 3 seeds"),
        ((0,), ("",), "a", "'a' is no combination; known are a-b"),
    ],
)
def test_what_cannot_be_shown_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: tuple[int, ...],
    fits: tuple[str, ...],
    only: str | None,
    said: str,
) -> None:
    monkeypatch.setattr("benchmarks.family.REPO", tmp_path)
    with pytest.raises(click.ClickException, match=said):
        show(Family("gemma3", ("a", "b")), seeds, fits, 32, only)
