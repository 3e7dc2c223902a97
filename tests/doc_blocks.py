"""The fenced blocks of the documentation: collected, run, and compared with what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import mergekit.card
import pytest
import torch
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_wp.cli import main
from tests.local_ray import LocalRay, on

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Block:
    """A fenced block: where its code begins, what its fence says, and the code."""

    page: Path
    line: int
    kind: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, however it is fenced or indented."""
    found: list[Block] = []
    fence, kind, begin, code = "", "", 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        match = _FENCE.match(line)
        if fence:
            if match and match[1].startswith(fence) and not match[2].strip():
                found.append(Block(page, begin, kind, code))
                fence = ""
            else:
                code += line + "\n"
        elif match:
            fence, kind, begin, code = match[1], match[2].strip(), number + 1, ""
        else:
            assert not line.startswith("    "), f"{page}, line {number}: code needs a fence"
    assert not fence, f"{page}, line {begin}: a block without an end"
    return found


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued ones joined."""
    return code.replace("\\\n", " ").splitlines()


class Shell:
    """Runs shell blocks in one folder: our commands in this process, the rest by `sh -e`.

    Programs that would leave the machine, or take it for long, only note their arguments. Workers
    of `--ray` are in this process, too (`tests.local_ray`).

    Args:
        folder: where they run.
        monkeypatch: of the test.
        steps: of a fit at most, where the page says no number; None for as many as it takes.
    """

    NOTED = ("pip", "hf", "make", "python")

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None = None
    ) -> None:
        self.steps = steps
        self.folder, self.noted = folder, folder.with_name(f"{folder.name}-noted")
        programs = folder.with_name(f"{folder.name}-programs")
        programs.mkdir()
        for name in self.NOTED:
            (programs / name).write_text(f'#!/bin/sh\necho "{name} $@" >> "{self.noted}"\n')
            (programs / name).chmod(0o755)
        self.noted.touch()
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.chdir(folder)
        LoaderCache.loaders.clear()  # it knows checkpoints by relative paths
        monkeypatch.setattr(mergekit.card, "is_hf", lambda path: False)  # asks the Hub
        on(monkeypatch, LocalRay(2))
        # the numbers on a page are a CPU's
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(self, block: Block) -> str:
        """Run a block; returns what it printed on stdout."""
        printed, shell = "", ""
        for line in commands(block.code):
            if line.startswith(("mergekit-wp ", "mergekit-yaml ")):
                printed += self._sh(block, shell) + self._ours(block, line)
                shell = ""
            else:
                shell += line + "\n"
        return printed + self._sh(block, shell)

    def _sh(self, block: Block, code: str) -> str:
        if not code.strip():
            return ""
        assert not re.search(r"^\s*(cd|export) |\bmergekit-wp ", code, re.MULTILINE), code
        done = subprocess.run(["sh", "-e", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}: {code}{done.stderr}"
        return done.stdout

    def _ours(self, block: Block, line: str) -> str:
        program, *arguments = shlex.split(line, comments=True)
        fits = arguments[0] == "fit" or (arguments[0] == "merge" and "--prompts" in arguments)
        if program == "mergekit-wp" and fits and self.steps and "--steps" not in arguments:
            arguments += ["--steps", str(self.steps)]
        if program == "mergekit-wp" and arguments[0] in ("score", "fit", "merge", "aim"):
            arguments.append("--overwrite")  # pages show several ways to one result
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as during:
            during.enter_context(contextlib.redirect_stdout(out))
            during.enter_context(contextlib.redirect_stderr(err))
            try:
                if program == "mergekit-yaml":
                    mergekit_yaml(arguments)
                else:
                    main(arguments)
            except SystemExit as stop:
                assert stop.code in (0, None), f"{block}: {line}\n{err.getvalue()[-3000:]}"
        return out.getvalue()


def agrees(shown: str, printed: str) -> bool:
    """Whether the documentation shows what a command printed.

    ``…`` stands for any text, spaces for any space, and a number for one that is 3% or 0.02 away:
    another processor rounds otherwise.
    """
    pattern = ""
    for part in re.split(rf"(…|{_NUMBER}|\s+)", shown.strip()):
        if part == "…":
            pattern += ".*?"
        elif re.fullmatch(_NUMBER, part):
            pattern += f"({_NUMBER})"
        else:
            pattern += r"\s+" if part.isspace() else re.escape(part)
    match = re.fullmatch(pattern, printed.strip(), re.DOTALL)
    if match is None:
        return False
    numbers = re.findall(_NUMBER, shown)
    return all(
        abs(float(want) - float(got)) <= 0.02 + 0.03 * abs(float(want))
        for want, got in zip(numbers, match.groups(), strict=True)
    )
