"""Ctrl-C and SIGTERM: the first lets a block of work finish, the second leaves at once.

Outside `finishing` there is nothing worth waiting for, and already the first one leaves.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ends the run. Not a KeyboardInterrupt: click makes another exception of those.

    Attributes:
        number: which signal.
        kept: the folder with the work that is done, where there is one.
    """

    kept: Path | None = None

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status, as shells have it."""
        return 128 + self.number


class _State:
    depth = 0
    waiting: int | None = None
    raised: int | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`; ignored ones (a job under nohup) stay so.

    Once interrupted, the next one ends the process wherever it is, without a word.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    after = dict(before)
    back_to_default = {n: signal.SIG_DFL for n, h in before.items() if h is not signal.SIG_IGN}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _arrived)
    hook, sys.unraisablehook = sys.unraisablehook, _swallowed
    try:
        yield
    except BaseException as error:
        found = unmasked(error)
        if isinstance(found, Interrupted):
            after |= back_to_default
        if found is not error:
            raise found from error
        raise
    finally:
        _State.raised = None
        sys.unraisablehook = hook
        for number, handler in after.items():
            signal.signal(number, handler)


def _arrived(number: int, _frame: FrameType | None) -> None:
    if _State.depth == 0 or _State.waiting is not None:
        _State.raised = number
        raise Interrupted(number)
    _State.waiting = number
    text = "\nmergekit-wp: finishing the current block; once more leaves at once\n"
    with suppress(OSError):  # not print: the signal may have come in the middle of one
        os.write(2, text.encode())


def _swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """Send again what came in a destructor or weak reference, for Python drops what these raise."""
    found = unraisable.exc_value
    if isinstance(found, Interrupted):  # soon, not now: this hook would drop it as well
        threading.Timer(0.01, os.kill, (os.getpid(), found.number)).start()
    else:
        sys.__unraisablehook__(unraisable)


def unmasked(error: BaseException) -> BaseException:
    """What ended the work: an interruption, where a library's C code made another error of it.

    torch, for one, answers whatever is raised while it looks at an object with a ValueError.
    """
    if isinstance(error, Exception) and _State.raised is not None:
        return Interrupted(_State.raised)
    return error


def stopping() -> bool:
    """Whether a first signal waits for the end of the block."""
    return _State.waiting is not None


@contextmanager
def finishing(last: bool = False) -> Iterator[None]:
    """A block of work that a first signal lets finish.

    Args:
        last: after it all is done, so that the signal has nothing left to stop.

    Raises:
        Interrupted: after the block, where a signal came meanwhile.
    """
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        waiting = _State.waiting
        if _State.depth == 0:
            _State.waiting = None
    if _State.depth == 0 and waiting is not None and not last:
        raise Interrupted(waiting)
