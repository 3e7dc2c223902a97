"""What a card says of the fit: of a merge by the fitted gates alone, and on which prompts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache

from mergekit_wp.card.fitted import fit_section
from mergekit_wp.card.scores import copy_scores
from mergekit_wp.cli import cli
from mergekit_wp.files.fit_section import Fit, Seen
from mergekit_wp.merging.plan import plan_only
from mergekit_wp.merging.recipe import read
from tests.every_command import make_world

CHANGED = "This recipe changes the gates that were fitted"
FIT = """fit base east west --prompts east=east.jsonl --prompts west=west.jsonl --guard open.jsonl
--out fitted --steps 2 --prompts-a-step 2 --max-new-tokens 2 --device cpu --limit 4"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fit, in the current folder."""
    root, before = make_world(tmp_path_factory.mktemp("world")), Path.cwd()
    os.chdir(root)
    LoaderCache.loaders.clear()
    result = CliRunner().invoke(cli, FIT.split())
    assert result.exception is None, result.exception
    yield root
    os.chdir(before)


def section(world: Path, change: Callable[[Any], object] = lambda _: None) -> str:
    """Of a merge by the fit's recipe, changed."""
    data = yaml.safe_load((world / "fitted" / "recipe.yml").read_text())
    change(data)
    path = world / "fitted" / "changed.yml"
    path.write_text(yaml.safe_dump(data))
    recipe = read(path)
    copies, _ = copy_scores(recipe, world / "copies")
    return fit_section(recipe, plan_only(recipe), copies) or ""


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["parameters"].update({"lambda": 0.5}),
        lambda data: data["parameters"].update({"lambda": 0}),
        lambda data: data["parameters"].update({"density": 0.3}),
        lambda data: data["parameters"].update({"granularity": "tensor"}),
        lambda data: data["models"][1]["parameters"].update({"weight": 0.2}),
        lambda data: data["models"][0]["parameters"].update(
            {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}
        ),
    ],
)
def test_other_gates_are_not_the_fits(world: Path, change: Callable[[Any], object]) -> None:
    said = section(world, change)
    assert CHANGED in said and "`mergekit-wp compare`" in said
    assert "recovery" not in said and "Guard" not in said


def test_what_leaves_the_gates_alone_is_the_fits(world: Path) -> None:
    def spelt_out(data: Any) -> None:
        data["parameters"] |= {"lambda": 1, "granularity": "component"}
        data["models"][0]["parameters"] |= {"weight": 1.0, "density": 1}

    assert section(world) == section(world, spelt_out)
    assert CHANGED not in section(world)


def test_a_card_has_it_once(world: Path) -> None:
    line = "merge fitted/recipe.yml merged --quiet --overwrite"
    assert CliRunner().invoke(cli, line.split()).exception is None
    text = (world / "merged" / "README.md").read_text()
    assert section(world) in text and text.count("recovery") == section(world).count("recovery")


def told(world: Path, **update: Any) -> str:
    """Of the same merge, had the fit been another."""
    recipe = read(world / "fitted" / "recipe.yml")
    copies, _ = copy_scores(recipe, world / "copies")
    fit = copies[0].manifest.fit
    assert fit is not None
    other = fit.model_copy(update=update)
    changed = [
        replace(one, manifest=one.manifest.model_copy(update={"fit": other})) for one in copies
    ]
    return fit_section(recipe, plan_only(recipe), changed) or ""


def reaching(fit: Fit, **seen: Seen) -> dict[str, Any]:
    history = copy.deepcopy(fit.history)
    judged = history[fit.best_step].judged
    assert judged is not None
    judged.update(seen)
    return {"history": history}


def test_prompts_guards_and_warnings(world: Path) -> None:
    recipe = read(world / "fitted" / "recipe.yml")
    fit = recipe.score_files[0].file.manifest.fit
    assert fit is not None
    good = Seen(kl=0.0, answers=1.0, tokens=1.0)
    reached = reaching(fit, east=good, west=good.model_copy(update={"answers": 0.6}), open=good)
    said = told(world, **reached, held_out={"east": 2, "west": 0, "open": 0}, limit=1.25)
    assert "| east | 1.00 | 1.00 |" in said and "| 2 held-out prompts |" in said
    assert "| west | 0.60 | 1.00 |" in said and "| the 4 prompts it was fitted on |" in said
    assert "No prompts of west were held out" in said
    west = "**Of west less than 0.9 of the expert's answers are reproduced whole"
    assert f"{west}, and the fit was stopped before it was done.**" in said
    reached |= {"held_out": {"east": 2, "west": 0, "open": 0}, "limit": 1.25, "done": True}
    assert f"{west}.**" in told(world, **reached)
    held = "Guard open: 1.000 times the base's perplexity on the 5 prompts it was fitted on; "
    assert f"{held}the limit of 1.25 is held; of the base's own tokens there 1.00 are" in said
    harmed = reaching(fit, east=good, west=good, open=Seen(kl=1.0, answers=0.0, tokens=0.0))
    said = told(world, **harmed, held_out={"east": 2, "west": 2, "open": 1}, limit=1.25)
    assert "2.718 times the base's perplexity on 1 held-out prompt; " in said
    assert "the limit of 1.25 is not held yet; of the base's own tokens" in said
    assert "were held out" not in said and "less than" not in said
    said = told(world, guards=(), limit=None)
    assert "Nothing was guarded" in said and "`--keep`" in said
