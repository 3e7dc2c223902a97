"""A family's comparison: which recipes and prompts it is given, and what is made before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks import combinations, family, files
from benchmarks.combinations import GRID, compare, make_missing, run, write_grid, write_recipe
from benchmarks.family import Family
from benchmarks.fit_table import FitTable

FAMILY = Family("toys", ("a", "b"))
Commands = list[tuple[str, ...]]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (combinations, family, files):
        monkeypatch.setattr(module, "REPO", tmp_path)
    for folder in ("base", "experts/a", "experts/b", "prompts", "tasks"):
        (FAMILY.build / folder).mkdir(parents=True)
    for skill in FAMILY.skills:
        FAMILY.prompts(skill).write_text(f'{{"prompt": "{skill}?", "response": "{skill}"}}\n')
        FAMILY.task(skill).write_text("")
    return FAMILY.build


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found: Commands = []

    def keep(*words: str, quiet: bool = False) -> None:
        found.append(words)

    for module in ("combinations", "fit_table"):
        monkeypatch.setattr(f"benchmarks.{module}.command", keep)
    return found


def after(words: tuple[str, ...], flag: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def test_what_exists_is_not_made_again(build: Path, ran: Commands) -> None:
    make_missing(FAMILY)
    assert ran == []


@pytest.mark.parametrize(
    ("gone", "made"),
    [
        ("base", ("python", "-m", "benchmarks.toys.fetch")),
        ("tasks/b.jsonl", ("python", "-m", "benchmarks.toys.tasks")),
        (
            "experts/b",
            ("python", "-m", "benchmarks.toys.experts", "--only", "b", "--seed", "0"),
        ),
    ],
)
def test_what_is_missing_is_made(
    build: Path, ran: Commands, gone: str, made: tuple[str, ...]
) -> None:
    path = build / gone
    remove: Callable[[], None] = path.rmdir if path.is_dir() else path.unlink
    remove()
    make_missing(FAMILY)
    assert ran == [made]


def test_a_recipe_names_the_experts_in_order(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "r.yml"
    write_recipe(FAMILY, path, ("b", "a"), [tmp_path / "b.safetensors", tmp_path / "a.safetensors"])
    data = yaml.safe_load(path.read_text())
    assert [Path(model["model"]).name for model in data["models"]] == ["b", "a"]
    assert [m["parameters"]["scores"] for m in data["models"]] == ["b.safetensors", "a.safetensors"]


def test_a_grid_has_the_methods_that_are_compared(tmp_path: Path) -> None:
    found = yaml.safe_load(write_grid(tmp_path / "g.yml", ("ties", "model_stock")).read_text())
    assert found == {"ties": yaml.safe_load(GRID.read_text())["ties"]}


def test_peers_have_the_fits_own_prompts(build: Path, ran: Commands, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    table = FitTable(FAMILY, ("--steps", "3"))
    compare(table, ("a", "b"), [recipe], ["ties", "regmean"], 9)
    [words] = ran
    assert words[:3] == ("mergekit-wp", "compare", "recipe.yml")
    assert after(words, "--prompts") == [
        f"{skill}=build/toys/fitting/prompts/{skill}.jsonl" for skill in FAMILY.skills
    ]
    assert table.unlabelled("a").read_text() == '{"prompt": "a?"}\n'  # not the answers
    assert after(words, "--out") == ["build/toys/compare/a-b+steps-3"]
    assert after(words, "--methods") == ["ties,regmean"]
    assert after(words, "--max-new-tokens") == ["9"]


def test_a_skill_that_is_not_merged_is_what_to_keep(build: Path, ran: Commands) -> None:
    three = Family("toys", ("a", "b", "c"))
    three.prompts("c").write_text("")
    compare(FitTable(three), ("a", "b"), [], ["ties"], 9)
    assert after(ran[0], "--task") == ["build/toys/tasks/a.jsonl", "build/toys/tasks/b.jsonl"]
    texts = {"stories.txt", "reports.txt", "talk.txt"}
    assert {Path(path).name for path in after(ran[0], "--keep")} == {"c.jsonl", *texts}


def test_a_family_is_fitted_and_scored_before_it_is_compared(build: Path, ran: Commands) -> None:
    run(FAMILY, "ties,scored-alone", None, "--steps 3", 32, 9)
    assert [words[1] for words in ran] == ["fit", "score", "score", "compare"]
    fit, *scores, comparison = ran
    assert fit[-2:] == ("--steps", "3")
    assert [after(words, "--prompts") for words in scores] == [
        [f"build/toys/prompts/{skill}.jsonl"] for skill in FAMILY.skills
    ]
    assert comparison[2:4] == (
        "build/toys/fitting/a-b+steps-3/recipe.yml",
        "build/toys/recipes/a-b/scored-alone.yml",
    )
    assert after(comparison, "--methods") == ["ties"]


def test_nothing_is_scored_that_is_not_asked_for(build: Path, ran: Commands) -> None:
    run(FAMILY, "ties", None, "--steps 3", 32, 9)
    assert [words[1] for words in ran] == ["fit", "compare"]
