"""Perplexity of merges on published text: its parts, its table, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import public_text
from benchmarks.gemma3.public_text import main
from mergekit_wp.comparison.rows import Comparison, Row


def row(name: str, times: float, spread: float = 0.0) -> Row:
    """A model at so many times the base's perplexity of the newspaper, the base's of the rest."""
    kept = {f"newspaper-{i}": -3 - math.log(times) + spread * (-1) ** i for i in range(10)}
    return Row(name, "peer", kept=kept | {f"encyclopedia-{i}": -2.0 for i in range(10)})


def test_perplexity_is_the_geometric_mean_of_parts_by_register() -> None:
    base = Row("base", "base", kept=row("base", 1.0).kept)
    ours = Row("weight_patching (untuned)", "ours", kept=row("", 1.0).kept)
    table = public_text.show(
        Comparison((base, ours, row("regmean", 2.0), row("ties", 2.0, 0.3)), (), True, "ours")
    )
    assert table.splitlines() == [
        "| perplexity, x base | newspaper | encyclopedia |",
        "|---|---:|---:|",
        "| weight_patching (untuned) | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |",
        "| regmean | 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] |",
        table.splitlines()[-1],
    ]
    cells = table.splitlines()[-1].strip("|").split("|")
    assert cells[2].strip() == "1.00 [1.00, 1.00]"
    value, low, high = (float(number.strip(" [],")) for number in cells[1].split())
    # ten values, five at +0.3 and five at -0.3
    reach = 1.96 * 0.3 / math.sqrt(10)
    assert value == 2.0
    assert (math.log(low / 2), math.log(high / 2)) == pytest.approx((-reach, reach), abs=0.02)


def test_every_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "newspaper": [f"n{i}" for i in range(50)],
        "encyclopedia": [f"e{i}" for i in range(25)],
    }
    monkeypatch.setattr(public_text, "registers", lambda: texts)
    parts = public_text.write_parts(tmp_path)
    assert len(parts) == 2 * public_text.PARTS
    for register, own in texts.items():
        found = [p.read_text().split() for p in parts if p.stem.startswith(f"{register}-")]
        assert sorted(text for part in found for text in part) == sorted(own)


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("family", "fit_table"):
        monkeypatch.setattr(f"benchmarks.{module}.REPO", tmp_path)
    for options, said in (([], "regmean; run bench"), (["--print"], "run without --print")):
        told = CliRunner().invoke(main, options)
        assert told.exit_code == 1 and said in told.output
    monkeypatch.setattr(public_text, "find_spec", lambda name: None)
    with pytest.raises(click.ClickException, match="`make bench` installs it"):
        public_text.registers()
