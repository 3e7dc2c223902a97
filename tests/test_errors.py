"""Messages name options as whoever reads them writes options: Python's way, or a command's."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError, option, spelled
from mergekit_wp.report.page import plot

PACKAGE = Path(__file__).parents[1] / "mergekit_wp"
#: what a user is told to type into a shell, whole
COMMAND = re.compile(r"mergekit-wp [a-z]+ [^';]*")


def test_an_option_is_spelt_for_its_reader() -> None:
    message = (
        f"{option('max_memory', '0=1GiB')}: leave {option('ray')} out, or add "
        f"{option('restart', True)} and {option('guards', 'FILE')}"
    )
    error = UserError(message)
    assert str(error) == "max_memory=0=1GiB: leave ray out, or add restart=True and guards=FILE"
    again = pickle.loads(pickle.dumps(error))  # as it comes from a worker
    for each in (error, again):
        each.use_flags({"guards": "--guard", "restart": "--restart"})
        assert (
            str(each) == "--max-memory 0=1GiB: leave --ray out, or add --restart and --guard FILE"
        )


def test_what_a_message_quotes_stays_one_printable_line() -> None:
    hostile = "a\x01restart\x03\x1b[2J\x02\nb"
    for text in (hostile, option("out", hostile)):
        for said in (spelled(text), spelled(text, {})):
            assert said.isprintable()


def test_a_command_says_its_own_flags(tmp_path: Path) -> None:
    arguments = ["plot", "none.safetensors", "--trace", "t.json", "--out", str(tmp_path / "p.png")]
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "--trace is drawn into a page; give --out FILE.html"
    with pytest.raises(UserError, match=r"^trace is drawn into a page; give out=FILE.html$"):
        plot("none.safetensors", tmp_path / "p.png", tmp_path / "t.json")
    done = CliRunner().invoke(cli, ["behaviors", "--out", str(tmp_path / "b.jsonl")])
    assert "mergekit-wp behaviors NAME --out FILE" in str(done.exception)


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a module that have a space, with {} for what is put in; no docstrings."""
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            inside.add(id(body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            parts = [node]
        else:
            continue
        text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)
        if " " in text:
            yield text


@pytest.mark.parametrize(
    "room", sorted(p.name for p in PACKAGE.iterdir() if p.suffix in ("", ".py"))
)
def test_the_library_knows_no_flags(room: str) -> None:
    if room in ("commands", "cli.py", "__pycache__"):
        return
    path = PACKAGE / room
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for text in texts(ast.parse(file.read_text())):
            assert not re.search(r"--[a-z]", COMMAND.sub("", text)), f"{file}: {text}"
