"""Checkers for `mergekit-wp compare --checkers benchmarks/smollm2/checkers.py`."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 2
MEMORY = 512 * 2**20
# Limits alone do not bind root: files could still be emptied or removed and programs started. So an
# audit hook, which Python code cannot take away, refuses every such event. What answers import is
# imported before.
GUARD = """
def guard():
    import sys, math, re, string, random, itertools, functools, collections, operator, typing, os
    forbidden = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "mmap.", "fcntl.")
    def refuse(event, arguments):
        if event.startswith(forbidden):
            raise PermissionError(event)
    sys.addaudithook(refuse)
guard()
del guard
"""


def code(item: dict[str, Any], output: str) -> bool:
    """Whether the function in an answer passes the item's assertions, run apart from this process.

    The program runs isolated (``python -I -S``) in an empty folder, may open, change and start
    nothing, and has 2 seconds and 512 MB: enough against accidents of a language model, not
    against an attacker.
    """
    source = function_in(output)
    if source is None:
        return False
    program = "\n".join([GUARD, source, *item["tests"], "print('passed')"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=3 * SECONDS,
                preexec_fn=_confine,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.endswith(b"passed\n")


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def function_in(output: str) -> str | None:
    """The code of an answer: the first fenced block, else everything from the first ``def``.

    Without a fence, text after the function is cut at the first line that is not indented.
    """
    if fence := re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", output, re.DOTALL):
        return fence[1]
    start = re.search(r"^(?:def|import|from) ", output, re.MULTILINE)
    if start is None:
        return None
    lines = output[start.start() :].split("\n")
    kept = []
    for line in lines:
        if (
            kept
            and line
            and not line[0].isspace()
            and not line.startswith(("def ", "import ", "@"))
        ):
            break
        kept.append(line)
    return "\n".join(kept)
