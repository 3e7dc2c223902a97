"""Built-in behaviours: usable pairs, fair items, rules that can be met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import read_prompts
from mergekit_wp.tasks import ifeval
from mergekit_wp.tasks.behaviors import Behavior, behavior, behaviors
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

FOLLOWING = {
    "capitals": "ALL OF THIS IS LOUD",
    "no-comma": "one thing; another thing",
    "title": "<<tea>>\nBoil the water first.",
    "sections": "Section 1\na\nSection 2\nb\nSection 3\nc",
    "quotation": '"Dear neighbour."',
    "highlights": "*one* thing and *another*",
}
PLAIN = "Well, here is a plain answer, without any of it."


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["behaviors", *map(str, arguments)])


def test_there_are_the_six_of_ifeval() -> None:
    assert {found.instruction_id for found in behaviors().values()} == set(ifeval.RULES)


@pytest.mark.parametrize("name", list(FOLLOWING))
def test_files_are_what_the_commands_read(name: str, tmp_path: Path) -> None:
    done = run(name, "--out", tmp_path / "p.jsonl", "--items", tmp_path / "i.jsonl")
    assert done.exception is None, done.exception
    prompts = read_prompts(tmp_path / "p.jsonl", None).prompts
    assert len(prompts) >= 32 and all(p.usable_contrast for p in prompts)
    assert all(str(p.prompt).startswith(str(p.contrast)) for p in prompts)
    assert len({str(p.prompt) for p in prompts}) == len(prompts)
    task = JsonlTask.read(tmp_path / "i.jsonl", Checkers.load(None))
    assert task.count("valid") >= 8 and task.count("test") >= 8
    scored = {str(p.contrast) for p in prompts}
    asked = [str(item["prompt"]) for item in task.items]
    assert not any(text.startswith(request) for text in asked for request in scored)
    wordings = behavior(name).wordings
    assert all(text.endswith(wordings[-1]) for text in asked)
    assert not any(str(p.prompt).endswith(wordings[-1]) for p in prompts)
    for item in task.items:
        assert task.checkers.judge(item, FOLLOWING[name]) == 1
        assert task.checkers.judge(item, PLAIN) == 0


def test_an_instruction_does_not_give_its_answer_away() -> None:
    # a model that repeats the request must not pass by that
    for name, found in behaviors().items():
        assert isinstance(found, Behavior)
        for item in found.items():
            if name in ("title", "highlights", "sections"):
                continue  # the format is shown in the request; a copy passes IFEval's rule as well
            passed = ifeval.follows([found.instruction_id], [found.kwargs], item["prompt"])
            assert passed == [name == "no-comma"]


def test_the_command_lists_and_refuses(tmp_path: Path) -> None:
    listed = run()
    assert listed.output.count("\n") == 6 and "whole answer in capital letters" in listed.output
    shown = run("title").output.splitlines()
    assert json.loads(shown[0])["contrast"]
    for arguments, message in (
        (["shouting"], "no built-in behaviour 'shouting'; there are capitals"),
        (["--out", tmp_path / "x"], "name the behaviour to write"),
    ):
        done = run(*arguments)  # type: ignore[arg-type]
        assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not list(tmp_path.iterdir())
