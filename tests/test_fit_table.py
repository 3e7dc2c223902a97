"""The table of fits: relative to the experts, perplexity of the base, printed of what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from benchmarks.family import Family
from benchmarks.fit_table import FitTable, Row, run, share, spending, table
from benchmarks.perplexity import REGISTERS, registers


def found(shift: float = 0.0, **scores: list[float]) -> dict[str, Any]:
    surprise = {name: [[50 + 10 * i + 10 * shift, 10] for i in range(4)] for name in REGISTERS}
    return {"scores": scores, "surprise": surprise}


BASE = found(a=[0, 0, 0, 0], b=[0, 0, 0, 0])


def test_a_merge_is_held_against_each_skills_own_expert() -> None:
    row = Row("a + b", found(a=[1, 1, 0, 0], b=[1, 1, 1, 1]), BASE, 0, {"a": [1] * 4, "b": [1] * 4})
    assert row.by_skill() == {"a": 0.5, "b": 1.0}
    draws = row.draws()
    assert draws.mean() == pytest.approx(0.75, abs=0.02)
    assert draws.min() >= 0.5
    assert draws.max() <= 1


def test_perplexity_is_relative_to_the_bases() -> None:
    row = Row("m", found(np.log(2), a=[1.0]), BASE)
    assert set(row.perplexities()) == {*REGISTERS, "all"}
    for value in row.perplexities().values():
        assert value == pytest.approx((2, 2, 2))


def test_the_table_says_which_skill_is_worst_and_sums_the_seconds() -> None:
    experts = {"a": [1.0] * 4, "b": [1.0] * 4}
    rows = [Row("base", BASE, BASE)]
    for cpu, right in ((100.0, [1.0, 1.0, 1.0, 0.0]), (50.0, [1.0] * 4)):
        merge = found(a=right, b=[1.0] * 4)
        rows.append(Row(f"merge {cpu:.0f}", merge, BASE, 0, experts, cpu))
    lines = table(rows, ("a", "b")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, first, last = cells[0], cells[3], cells[-1]
    assert first[head.index("worst skill")] == "0.75"
    assert first[head.index("relative to the experts")].startswith("0.88 [")
    assert last[head.index("worst skill")] == "0.75"
    assert last[head.index("relative to the experts")].startswith("0.94 [")
    assert last[head.index("CPU s of the fit")] == "150"
    assert len({len(line) for line in cells}) == 1


def test_training_seeds_are_named_and_make_the_interval() -> None:
    experts = {"a": [1.0] * 4, "b": [1.0] * 4}
    rows = [Row("base", BASE, BASE, seed) for seed in (0, 1)]
    for seed, right in ((0, 1.0), (1, 0.9)):
        rows.append(Row("a + b", found(a=[right] * 4, b=[right] * 4), BASE, seed, experts, 1.0))
    lines = table(rows, ("a", "b")).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "seed 0: base",
        "seed 1: base",
        "seed 0: a + b",
        "seed 1: a + b",
    ]
    # Student: 0.95 +- 12.706 * 0.05
    assert lines[-1].split("|")[2].strip() == "0.95 [0.31, 1.59]"


def test_an_expert_with_nothing_right_is_told() -> None:
    with pytest.raises(click.ClickException, match="train it anew"):
        share([1, 0], [0, 0])


def test_a_combination_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="known are a-b"):
        run([FitTable(Family("gemma3", ("a", "b")))], "b-a", 8, print_only=True, record=False)


def test_seconds_add_up_over_runs_that_fail(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "a-b.json"
    for _ in range(2):
        with pytest.raises(SystemExit), spending(path):
            sum(i * i for i in range(200_000))
            raise SystemExit("killed")
    first = json.loads(path.read_text())
    with spending(path):
        sum(i * i for i in range(200_000))
    assert json.loads(path.read_text()) > first > 0


def test_what_is_recorded_is_printed_where_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.family.REPO", tmp_path)
    monkeypatch.setattr("benchmarks.fit_table.REPO", tmp_path)
    here = FitTable(Family("family", ("a", "b"), seed=1))
    merge, expert = found(a=[1.0, 0.0], b=[1.0, 1.0]), found(a=[1.0, 1.0], b=[1.0, 1.0])
    for name, of in {"base": expert, "a": expert, "b": expert, "a-b": merge}.items():
        here.kept(name, lambda of=of: of | {"answers": {"a": ["a user's words"]}})
    (here.folder / "cpu").mkdir()
    (here.folder / "cpu" / "a-b.json").write_text("12.4")
    run([here], None, 8, print_only=True, record=True)
    printed = capsys.readouterr().out
    assert "| a + b | 0.75 " in printed
    assert printed.rstrip().endswith("| 12 |")
    shutil.rmtree(here.folder)
    run([here], None, 8, print_only=True, record=False)
    assert capsys.readouterr().out == printed
    for path in here.committed.iterdir():
        assert "words" not in path.read_text()


def test_options_keep_their_results_apart() -> None:
    family = Family("gemma3", ("a", "b"))
    names = {FitTable(family, o).name(("a", "b")) for o in ((), ("--steps", "9"), ("--unguarded",))}
    assert names == {"a-b", "a-b+steps-9", "a-b+unguarded"}
    assert FitTable(family, ("--steps", "9"), n=64).name(("a", "b")) == "a-b+64-prompts-steps-9"


def test_numbers_of_prompts_keep_their_files_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.family.REPO", tmp_path)
    family = Family("toys", ("a", "b"))
    family.prompts("a").parent.mkdir(parents=True)
    rows = (json.dumps({"prompt": str(i), "response": "no"}) + "\n" for i in range(70))
    family.prompts("a").write_text("".join(rows))
    few, more = (FitTable(family, n=n).unlabelled("a") for n in (32, 64))
    for path, n in ((few, 32), (more, 64)):
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"prompt": str(i)} for i in range(n)
        ]
    assert not capsys.readouterr().err
    FitTable(family, n=128).unlabelled("a")
    assert "a: 128 prompts are asked for, 70 are there" in capsys.readouterr().err


def test_three_registers_of_texts_of_a_length() -> None:
    texts = registers()
    assert tuple(texts) == REGISTERS
    for lines in texts.values():
        assert len(lines) == 10
        assert all(40 <= len(line.split()) <= 70 for line in lines)
