"""`mergekit-wp plot`: valid, self-contained, safe files for every shape of score file."""

from __future__ import annotations

import io
import os
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from markupsafe import escape
from matplotlib.figure import Figure
from PIL import Image

from mergekit_wp.architectures import Dims
from mergekit_wp.architectures.families import LLAMA
from mergekit_wp.commands.inspect import inspect
from mergekit_wp.commands.plot import plot
from mergekit_wp.errors import DiskError, UserError
from mergekit_wp.files.scorefile import ScoreFile, read, write
from mergekit_wp.report import figures, fit_history, merge_preview, panels, summary
from mergekit_wp.report.page import html
from mergekit_wp.report.ranking import rank, select
from tests.factory import make_fit, make_score_file

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


def test_the_scale_of_scores_reaches_from_the_lowest_to_the_highest() -> None:
    scale = panels.ColourScale.of_scores("gain", [np.array([0.5, np.nan, -2.0]), np.array([4.0])])
    assert (scale.low, scale.high) == (-2.0, 4.0) and scale.ticks == [-2.0, 0.0, 1.0, 4.0]
    nothing = panels.ColourScale.of_scores("gain", [np.zeros(3)])
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    below = panels.ColourScale.of_scores("gain", [np.array([-0.5])])
    assert (below.low, below.high) == (-0.5, 0.0) and below.ticks == [-0.5, 0.0]


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
    assert tags.tags.count("svg") == 12 == tags.attributes.count(("role", "img"))
    assert sum(name == "aria-label" and bool(value) for name, value in tags.attributes) > 10
    assert "What a merge would take from it" in page
    assert "merge_method: weight_patching" in page
    score_file = read(source)
    leaders = [
        row.name
        for estimand in ("share", "gain")
        for row in rank(score_file, select(score_file, estimand), top=5, fine=True).rows()
    ]
    for text in ("share/kl", "gain/kl", "exact swaps", "K/V groups", *leaders):
        assert text in page.replace("<wbr>", "")


def company_file(*references: str) -> ScoreFile:
    """One of the files of experts that were fitted together."""
    fit, company = make_fit(*references)
    made = make_score_file(estimands=("path",), company=company, fit=fit)
    said = {"behavior": company[0].behavior, "verification": None}
    return ScoreFile(made.manifest.model_copy(update=said), made.tensors)


@pytest.mark.parametrize("score_file", [make_score_file(), company_file("one", "two")])
def test_three_sentences_and_one_picture_stand_first(score_file: ScoreFile) -> None:
    page = html(score_file)
    before, *folded = page.split("<details")
    assert re.findall(r"<p>.*?</p>", before.partition('id="verdict"')[2]) == [
        f"<p>{escape(sentence)}</p>" for sentence in summary.verdict(score_file)
    ]
    assert before.count("<svg") == 1
    assert len(folded) > 3 and not any(part.startswith(" open") for part in folded)
    assert "`" not in page


def test_no_column_or_table_without_content() -> None:
    page = html(make_score_file(estimands=("share",)))
    assert "<th>name</th>" in page and "± se" not in page
    assert "not recorded" not in page and "Pearson" not in page and ">–<" not in page
    alike = company_file("one", "two")
    for key in [k for k in alike.tensors if k.startswith("path/")]:
        alike.tensors[key] = torch.ones_like(alike.tensors[key])
    assert "Leading" not in html(alike), "twenty leaders of one score are no leaders"


def test_gates_are_drawn_from_zero_to_their_bound() -> None:
    score_file = company_file("one", "two")
    for panel in figures.panel_list(score_file, "path", "kl"):
        ax = Figure().add_subplot()
        drawn = panel.draw(ax)
        if drawn is None:
            assert ax.get_xlim() == (0, 1.5) and ax.get_xlabel() == "mean gate"
        elif drawn[1] is None:
            assert ax.get_images()[0].get_extent()[:2] == [0, 1.5] and ax.get_xlabel() == "gate"
        else:
            assert drawn[0].get_clim() == (0, 1.5) and drawn[1].unit == "gate"
    # tensors of one role and layer are two norms here: a gate is their mean
    norms = panels.tensor_grid(score_file.manifest, np.ones(20), mean=True)[0][:, -1]
    assert norms.tolist() == [1, 1]


def test_a_page_has_one_scale_of_colours_and_zero_is_white() -> None:
    score_file = make_score_file(estimands=("share", "gain"), criteria=("kl", "anchor"))
    limits, ends = set(), []
    for estimand, criterion in select(score_file).pairs:
        for panel in figures.panel_list(score_file, estimand, criterion):
            drawn = panel.draw(Figure().add_subplot())
            if drawn is not None and drawn[1] is not None:
                image, scale = drawn
                limits.add(image.get_clim())
                seen = np.asarray(image.get_array())
                ends += [seen.min(), seen.max()]
                assert image.to_rgba(0.0)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)
                assert set(scale.ticks) >= {0.0, image.get_clim()[1]}
    [limit] = limits
    assert limit == pytest.approx((min(ends), max(ends)))


def test_the_recipe_shown_names_the_known_company() -> None:
    score_file = company_file("models/one", "models/two")
    found = merge_preview.merge_preview(score_file)
    assert found is not None
    recipe = yaml.safe_load(merge_preview.recipe(score_file, found))
    assert [(m["model"], m["parameters"]["scores"]) for m in recipe["models"]] == [
        ("models/one", "one.safetensors"),
        ("models/two", "two.safetensors"),
    ]


def test_legends_cover_no_bars_and_steps_and_layers_are_whole() -> None:
    fitted, scored = company_file("one", "two"), make_score_file(dims=Dims(3, 4, 2, 6, LLAMA))
    found = merge_preview.merge_preview(scored)
    assert found is not None
    for draw in (
        partial(merge_preview.draw, found),
        partial(fit_history.draw, fitted.manifest),
        partial(fit_history.draw_front, fitted.manifest),
    ):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        ax = figure.add_subplot()
        draw(ax)
        figure.draw_without_rendering()
        [legend] = figure.legends
        assert legend.get_window_extent().y0 >= ax.get_window_extent().y1 - 1
        if ax.get_xlabel() in ("step", "layer"):
            assert all(tick == round(tick) for tick in ax.get_xticks())


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
