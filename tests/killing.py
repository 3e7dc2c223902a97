"""Runs of the command line in processes that can be killed, and a log of their blocks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# every process is forked from one that has imported everything and run nothing yet
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.killing_preload"])


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file grows beyond `limit` bytes, as if the disk were full; needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _child(arguments: list[str], stderr: Connection, log: Connection, limit: int | None) -> None:
    """Run a command; pipes, unlike files, stay open to it when the disk is full."""
    import torch

    from mergekit_wp import cli, interrupts
    from mergekit_wp.comparison import evaluation
    from mergekit_wp.joint import ascent
    from mergekit_wp.runs import journal

    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(stderr.fileno(), number)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)

    @contextmanager
    def listening() -> Iterator[None]:
        with interrupts.listening():
            os.write(log.fileno(), b"r")
            yield

    plain = interrupts.finishing

    @contextmanager
    def finishing(last: bool = False) -> Iterator[None]:
        os.write(log.fileno(), b"" if last else b"s")
        with interrupts.finishing(last):
            yield

    cli.listening = listening  # type: ignore[attr-defined]
    for module in (journal, ascent, evaluation):
        assert module.finishing is plain, f"{module.__name__} runs no blocks"
        module.finishing = finishing  # type: ignore[attr-defined]
    with small_files(resource.RLIM_INFINITY if limit is None else limit):
        cli.main(arguments)


class Run:
    """One start of a command.

    Args:
        arguments: of the command line.
        limit: no file may become larger.
    """

    def __init__(self, arguments: Sequence[str], limit: int | None = None) -> None:
        self._stderr, stderr = _SERVER.Pipe(duplex=False)
        self._log, log = _SERVER.Pipe(duplex=False)
        given = (list(arguments), stderr, log, limit)
        self.process: ForkServerProcess = _SERVER.Process(target=_child, args=given)
        self.process.start()
        stderr.close()
        log.close()
        assert os.read(self._log.fileno(), 1) == b"r", "it did not come as far as main()"

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it still runs."""
        if self.process.exitcode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def await_blocks(self, count: int) -> None:
        """Wait until it has begun so many blocks, or has ended."""
        while count and os.read(self._log.fileno(), 1):
            count -= 1

    def ended(self, seconds: float | None = None) -> int | None:
        """Exit status, minus the signal where one ended it; None when it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def said(self) -> str:
        """All that it printed."""
        return _rest(self._stderr).decode()

    def blocks(self) -> int:
        """How many blocks it began, beside those waited for."""
        return _rest(self._log).count(b"s")


def _rest(pipe: Connection) -> bytes:
    found = b""
    while part := os.read(pipe.fileno(), 65536):
        found += part
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
