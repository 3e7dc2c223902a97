"""docs/architecture.md shows the house as it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()


def layers() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = settings["tool"]["importlinter"]["contracts"][0]
    assert contract["exhaustive"] and "ignore_imports" not in contract
    found: list[str] = contract["layers"]
    return found


def test_every_place_it_names_is_there() -> None:
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))", PAGE))
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / "mergekit_wp" / name).exists()]


def test_every_name_in_a_module_is_there() -> None:
    for path, name in re.findall(r"`([a-z_/]+\.py): ([A-Za-z_.]+)`", PAGE):
        text = (ROOT / "mergekit_wp" / path).read_text()
        assert all(re.search(rf"(def|class) {part}\b", text) for part in name.split(".")), name


def test_the_picture_points_down_the_contract() -> None:
    order, picture = layers(), PAGE.split("```mermaid")[1].split("```")[0]
    drawn: set[str] = set()
    for line in picture.splitlines():
        chain = [name.strip() for name in line.split("-->")]
        if len(chain) > 1:
            places = [order.index(name) for name in chain]
            assert places == sorted(places), chain
            drawn |= set(chain)
    rooms = {p.parent.name for p in (ROOT / "mergekit_wp").glob("*/__init__.py")}
    assert rooms <= drawn
