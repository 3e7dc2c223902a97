"""`mergekit-wp plot`: valid, self-contained, safe files for every shape of score file."""

from __future__ import annotations

import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.commands.inspect import inspect
from mergekit_wp.commands.plot import plot
from mergekit_wp.errors import DiskError, UserError
from mergekit_wp.files.scorefile import ScoreFile, read, write
from mergekit_wp.report import figures, panels
from mergekit_wp.report.page import html
from mergekit_wp.report.ranking import rank, select
from tests.factory import make_score_file

HOSTILE = "<script>alert(1)</script> \"quote' $\\frac{x$ {{ 7*7 }} \x1b[31m 大写"


def run(source: Path, out: Path) -> None:
    result = CliRunner().invoke(plot, [str(source), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(make_score_file(), tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A score file that is quick to draw."""
    write(make_score_file(estimands=("share",), kinds=("layer",)), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def hostile_file() -> ScoreFile:
    score_file = make_score_file(estimands=("share",))
    manifest = score_file.manifest
    bad = manifest.expert.model_copy(update={"reference": HOSTILE, "revision": HOSTILE})
    names = (*manifest.tensor_names[:-1], HOSTILE)
    fields = {"behavior": HOSTILE, "expert": bad, "tensor_names": names, "created": HOSTILE}
    fields |= {"versions": {HOSTILE: HOSTILE}, "dtype": HOSTILE}
    return ScoreFile(manifest.model_copy(update=fields), score_file.tensors)


class Tags(HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


@pytest.mark.parametrize(
    "score_file",
    [
        make_score_file(dims=Dims(1, 1, 1, 1, LLAMA), estimands=("gain",)),
        make_score_file(dims=Dims(2, 2, 1, 3, LLAMA), kinds=("tensor",), estimands=("share",)),
        make_score_file(
            dims=Dims(80, 64, 8, 12, LLAMA), estimands=("knockout",), kinds=("head", "layer")
        ),
        make_score_file(criteria=("kl", "anchor"), kinds=("kv_group", "neuron")),
    ],
    ids=["one of each", "tensors only", "80 by 64", "two criteria"],
)
def test_every_shape_gives_a_sane_picture(score_file: ScoreFile) -> None:
    image = Image.open(io.BytesIO(figures.png(score_file)))
    image.load()
    assert image.format == "PNG"
    assert 300 < image.width < 5000 and 300 < image.height < 5000
    assert image.convert("L").getextrema()[0] < 100


def test_zero_scores_draw() -> None:
    score_file = make_score_file(estimands=("share",))
    zero = ScoreFile(score_file.manifest, {k: v * 0 for k, v in score_file.tensors.items()})
    assert figures.png(zero).startswith(b"\x89PNG")
    assert "<svg" in html(zero)


def test_zero_is_in_the_middle_of_the_colours() -> None:
    assert panels.limit(np.array([0.5, -2.0])) == 2.0
    assert panels.limit(np.zeros(3)) == 1.0


def test_tensor_grid_places_roles_and_leaves_gaps() -> None:
    manifest = make_score_file().manifest
    scores = np.arange(len(manifest.tensor_names), dtype=float)
    grid, columns, outside = panels.tensor_grid(manifest, scores)
    assert columns == ["q", "k", "v", "o", "gate", "up", "down", "norms"]
    at = {name: i for i, name in enumerate(manifest.tensor_names)}
    assert grid[1, 6] == at["model.layers.1.mlp.down_proj.weight"]
    first = at["model.layers.0.input_layernorm.weight"]
    assert grid[0, 7] == 2 * first + 1
    assert outside == [("embedding", 0.0), ("final norm", len(scores) - 1.0)]
    lonely = manifest.model_copy(update={"tensor_names": ("model.layers.1.mlp.up_proj.weight",)})
    grid, columns, outside = panels.tensor_grid(lonely, np.ones(1))
    assert columns == ["up"] and np.isnan(grid[0, 0]) and grid[1, 0] == 1 and not outside


def test_neuron_axis_bends_between_one_and_four_decades_below_the_largest() -> None:
    assert panels.bend(np.array([1.0, 1e-9, 1e-9])) == 1e-4
    assert panels.bend(np.array([1.0, 0.9, 0.8])) == 0.1
    assert panels.bend(np.array([1.0, 0.01, 0.01, 0.0])) == 0.01


def test_page_is_self_contained_and_says_it_all(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    tags = parse(page)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert not {"script", "link", "iframe", "object", "form"} & set(tags.tags)
    for name, value in tags.attributes:
        assert name not in ("src", "action") and not name.startswith("on")
        if name.endswith("href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert '<meta name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert tags.tags.count("svg") == 11 == tags.attributes.count(("role", "img"))
    assert sum(name == "aria-label" and bool(value) for name, value in tags.attributes) > 10
    for title in ("In short", "What a merge would take from it"):
        assert title in page
    assert "merge_method: weight_patching" in page
    score_file = read(source)
    leaders = [
        row.name
        for estimand in ("share", "gain")
        for row in rank(score_file, select(score_file, estimand), top=5, fine=True).rows()
    ]
    for text in ("share/kl", "gain/kl", "exact swaps", "K/V groups", *leaders):
        assert text in page.replace("<wbr>", "")


def test_ids_of_a_page_are_unique_and_all_references_resolve(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    ids = [value for name, value in parse(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_hostile_text_stays_text() -> None:
    page = html(hostile_file())
    tags = parse(page)
    assert "script" not in tags.tags and "\x1b" not in page
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert figures.png(hostile_file()).startswith(b"\x89PNG")


def test_same_file_same_bytes() -> None:
    score_file = make_score_file(estimands=("share",), kinds=("head",))
    assert html(score_file) == html(score_file)
    assert figures.png(score_file) == figures.png(score_file)


def test_out_is_replaced_and_its_folder_made(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.PNG"
    run(small, out)
    out.write_bytes(b"old")
    run(small, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(out.parent) == ["scores.PNG"]


def test_other_suffixes_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path / "nowhere.safetensors", tmp_path / "scores.pdf")
    assert str(error.value) == (f"out={tmp_path}/scores.pdf: plot writes .html or .png, not '.pdf'")


def test_nothing_is_left_behind_by_a_failure(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "page.html"
    run(small, out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match=r"page\.html cannot be written: No space left on device"):
        run(small, out)
    assert os.listdir(out.parent) == ["page.html"] and out.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        run(small, small / "page.html")


@pytest.mark.parametrize("command", [plot, inspect])
def test_help_shows_examples_line_by_line(command: click.Command) -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert f"\n    mergekit-wp {command.name} caps.safetensors" in text
    assert "\\b" not in text and "\b" not in text
