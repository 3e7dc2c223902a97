"""Devices by name."""

from __future__ import annotations

import torch

from mergekit_wp.errors import UserError


def check_device(name: str) -> None:
    """Refuse a device that cannot compute here.

    Raises:
        UserError: names it.
    """
    try:
        usable = torch.device(name).type != "meta"
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used here: {reason}") from error
    if not usable:
        raise UserError(f"device '{name}' holds no numbers")


def choose_device(name: str) -> str:
    """A device that can be used here; ``auto`` is the GPU, where there is one.

    Raises:
        UserError: it cannot be used; names it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
