"""Code answers are run apart: right ones pass, wrong or harmful ones do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.smollm2 import checkers
from benchmarks.smollm2.checkers import code, function_in

ITEM = {"tests": ["assert f(1) == 2", "assert f(-1) == 0"]}


@pytest.mark.parametrize(
    "output",
    [
        "def f(x):\n    return x + 1",
        "```python\ndef f(x):\n    return x + 1\n```\nIt adds one.",
        "Sure!\n```\ndef f(x):\n    return x + 1\n",  # cut before the fence ended
        "Here it is:\ndef f(x):\n    return x + 1\nThis adds one.",
        "import math\ndef f(x):\n    return math.floor(x) + 1",
    ],
)
def test_right_answers_pass(output: str) -> None:
    assert code(ITEM, output) is True


@pytest.mark.parametrize(
    "output",
    [
        "",
        "x + 1",
        "def f(x):\n    return x",
        "def g(x):\n    return x + 1",
        "def f(x)\n    return x + 1",
        "def f(x):\n    raise SystemExit(0)",  # leaves before the assertions
        "def f(x):\n    import os\n    os._exit(0)",
        "def f(x):\n    return [0] * 10**10 and x + 1",  # 80 GB
    ],
)
def test_wrong_answers_fail(output: str) -> None:
    assert code(ITEM, output) is False


def test_an_endless_loop_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "SECONDS", 1)
    start = time.monotonic()
    assert code(ITEM, "def f(x):\n    while True:\n        pass") is False
    assert time.monotonic() - start < 10


def test_a_sleeping_answer_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "SECONDS", 0.3)
    monkeypatch.setattr(checkers, "_confine", lambda: None)  # only the wall clock
    start = time.monotonic()
    assert code(ITEM, "import time\ndef f(x):\n    time.sleep(60)\n    return x + 1") is False
    assert time.monotonic() - start < 10


def test_an_answer_cannot_write_a_file(tmp_path: Path) -> None:
    target = tmp_path / "written"
    target.write_text("kept")
    body = f"    with open({str(target)!r}, 'a') as file:\n        file.write('more')\n"
    assert code(ITEM, f"def f(x):\n{body}    return x + 1") is False
    assert target.read_text() == "kept"


def test_code_runs_without_this_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    look = "import os\ndef f(x):\n    assert 'SECRET' not in os.environ\n    return x + 1"
    assert code(ITEM, look) is True


def test_function_in_keeps_helpers_and_cuts_prose() -> None:
    answer = "Yes.\ndef g(x):\n    return x\n\ndef f(x):\n    return g(x)\nNow try it."
    assert function_in(answer) == "def g(x):\n    return x\n\ndef f(x):\n    return g(x)"
    assert function_in("no function") is None
