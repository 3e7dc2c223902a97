"""The house of docs/architecture.md: what a newcomer may rely on when looking for something."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import make_model, perturbed, save, write_prompts
from tests.test_scoring import Quiet

ROOT = Path(__file__).parents[1] / "mergekit_wp"
MODULES = sorted(ROOT.rglob("*.py"))
ROOMS = sorted({path.parent for path in MODULES} - {ROOT})


def test_the_root_is_a_hall_with_few_doors() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 14


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_has_one_subject_and_says_it(room: Path) -> None:
    """3 to 16 files (data files of `behaviors` count), and an `__init__` that says what for.

    Of commands there are as many as there are.
    """
    files = [path for path in room.iterdir() if path.is_file()]
    assert 3 <= len(files) <= (99 if room.name == "commands" else 16), [p.name for p in files]
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


#: what every room stands on: words, errors, files, how checkpoints and prompts are opened and read
FOUNDATION = ("terms", "errors", "interrupts", "files", "models", "architectures", "prompts")


def passed_through(call: Callable[[], object]) -> set[str]:
    """Modules of the package whose functions run during a call, as ``room/module.py``."""
    found: set[str] = set()

    def seen(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found - {"autoload.py"}  # looks at every import, whoever imports


def test_a_score_passes_through_few_modules(tmp_path: Path) -> None:
    """Every estimand and criterion that is the default, from the request to the file."""
    base = make_model("llama-tied")
    request = ScoreRequest(
        base=str(save(base, tmp_path / "base")),
        expert=str(save(perturbed(base), tmp_path / "expert")),
        prompts=write_prompts(tmp_path / "p.jsonl", 4, contrast=True),
        out=tmp_path / "scores.safetensors",
        max_new_tokens=2,
    )
    every = passed_through(lambda: score(request, Quiet()))
    assert len(every) <= 53, sorted(every)
    above = {m for m in every if not m.removesuffix(".py").startswith(FOUNDATION)}
    assert {"scoring/score.py", "runs/run.py", "engine/replay.py"} < above
    assert len(above) <= 24, sorted(above)


BENCHMARKS = sorted((ROOT.parent / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_a_benchmark_imports_only_what_there_is(path: Path) -> None:
    """Benchmarks run seldom, and not all of what they need is installed here."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("benchmarks", "mergekit_wp")
        ):
            folder = ROOT.parent / str(node.module).replace(".", "/")
            module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            assert module.exists(), node.module
            here = {alias.name for alias in node.names} - names_in(module)
            parts = {name for name in here if (folder / f"{name}.py").exists()}
            parts |= {name for name in here if (folder / name / "__init__.py").exists()}
            assert here == parts, f"{node.module} has no {', '.join(sorted(here - parts))}"


def names_in(module: Path) -> set[str]:
    """What a module defines or imports for others: not within a function."""
    found: set[str] = set()
    tree = ast.parse(module.read_text())
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for inner in ast.walk(node)
        if inner is not node
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Constant) and module == ROOT / "__init__.py":
            found.add(str(node.value))  # public names are given lazily, by their strings
    return found
