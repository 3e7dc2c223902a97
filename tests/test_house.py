"""The house of docs/architecture.md: what a newcomer may rely on when looking for something."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mergekit_wp"
MODULES = sorted(ROOT.rglob("*.py"))
ROOMS = sorted({path.parent for path in MODULES} - {ROOT})


def test_the_root_is_a_hall_with_few_doors() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 14


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_has_one_subject_and_says_it(room: Path) -> None:
    """3 to 16 files (data files of `behaviors` count), and an `__init__` that says what for."""
    files = [path for path in room.iterdir() if path.is_file()]
    assert 3 <= len(files) <= 16 + (room.name == "commands"), [path.name for path in files]
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said and len(said) > 60


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_one_job(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_no_two_types_have_one_name() -> None:
    """Classes, and aliases such as ``Array = ...``; private ones are a module's own."""
    homes = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if name[0].isupper() and not name.isupper() and len(name) > 1:
                    homes[name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_every_literal_of_the_vocabulary_is_at_home_in_terms() -> None:
    """A `Literal` that has a name has it there, and nowhere else."""
    strangers = []
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Literal":
                strangers.append(str(path.relative_to(ROOT)))
    assert set(strangers) == {"terms.py"}


def test_importing_the_package_costs_nothing() -> None:
    """The start-up hook imports it in every process of an environment."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT.parent)!r}); before = set(sys.modules)\n"
        "import mergekit_wp, mergekit_wp.autoload\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mergekit_wp", "mergekit_wp.autoload"]
