"""Torch as a command finds it, whatever a caller from Python is inside of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """No autocast, no inference mode, new tensors on the CPU.

    Numbers would not be of the dtype that files say, slopes could not be taken, and models would be
    read to where nobody looks for them.
    """
    import torch  # takes long, and `--help` asks for what imports this

    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
