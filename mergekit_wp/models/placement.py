"""Where the weights of a model are kept that its device cannot hold: accelerate's device map.

All layers compute on one device, wherever their weights are kept: on it, on other GPUs, in main
memory, or nowhere but in the checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int
from torch import nn

from mergekit_wp.errors import UserError, option
from mergekit_wp.models.memory import free_memory

#: the place of weights that are read from the checkpoints whenever they are needed
DISK = "disk"
#: bytes of weights by device as accelerate names them: "cpu", or the number of a GPU; what is not
#: named is not used, and where nothing is, all devices are, by their free memory
MaxMemory = Mapping[str, int]

_SIZE = re.compile(r"\d+(\.\d+)?([KMG]i?B)")


def parse_size(text: str) -> int | None:
    """Bytes of a size as a user writes it, as in 20GiB; None where it is none."""
    return convert_file_size_to_int(text) if _SIZE.fullmatch(text) else None


def parse_max_memory(texts: Iterable[str], device: str) -> dict[str, int]:
    """Limits as a user writes them: ``0=20GiB``, ``cpu=60GiB``.

    Args:
        texts: one a device.
        device: that computes.

    Raises:
        UserError: no such limit, or of a device that cannot be used here.
    """
    found: dict[str, int] = {}
    for text in texts:
        name, equals, written = text.partition("=")
        size = parse_size(written)
        if not equals or size is None or not (name == "cpu" or name.isdecimal()):
            raise UserError(
                f"{option('max_memory', text)}: expected DEVICE=SIZE with 'cpu' or the number of "
                "a GPU, and KiB, MiB, GiB, KB, MB or GB, as in 0=20GiB or cpu=60GiB"
            )
        if name in found:
            raise UserError(f"{option('max_memory')}: '{name}' is given twice")
        if name != "cpu":
            if torch.device(device).type == "cpu":
                raise UserError(
                    f"{option('max_memory', text)}: with {option('device', 'cpu')}, weights are "
                    "kept on the cpu or read from the checkpoints"
                )
            check_device(f"cuda:{name}")
        found[name] = size
    return found


def check_places(device: str) -> None:
    """Refuse devices for which no device map is made.

    Raises:
        UserError: names it.
    """
    if torch.device(device).type not in ("cpu", "cuda"):
        raise UserError(
            f"{option('device_map')} works with {option('device', 'cpu')} and cuda, not with "
            f"'{device}'"
        )


def free_places(device: str) -> dict[str, int]:
    """Limits by free memory.

    Half of that of the device which computes: activations and the donor's weights are there too.
    Of the others nine tenths, as transformers takes.
    """
    limits = {}
    if torch.device(device).type == "cuda":
        for i in range(torch.cuda.device_count()):
            limits[str(i)] = free_memory(f"cuda:{i}")
    limits["cpu"] = free_memory("cpu")
    own = _name(device)
    return {k: v // 2 if k == own else v // 10 * 9 for k, v in limits.items()}


def placement(
    model: nn.Module,
    layer: type[nn.Module],
    dtype: torch.dtype,
    device: str,
    max_memory: MaxMemory,
) -> dict[str, str]:
    """The place of every parameter: `device`, another torch device, or `DISK`.

    Args:
        model: on the meta device, tied.
        layer: class of its decoder layers; their tensors stay together.
        dtype: of the weights.
        device: that computes; it is filled first, and keeps room for the largest layer.
        max_memory: limits.
    """
    limits = dict(max_memory) or free_places(device)
    own = _name(device)
    gpus = sorted((name for name in limits if name != "cpu"), key=lambda n: (n != own, int(n)))
    # accelerate fills GPUs by number, and thinks that the first one computes
    numbered: dict[int | str, int | str] = {i: limits[name] for i, name in enumerate(gpus)}
    if "cpu" in limits:
        numbered["cpu"] = limits["cpu"]
    found = infer_auto_device_map(
        model,
        max_memory=numbered,
        no_split_module_classes=[layer.__name__],
        special_dtypes={name: dtype for name, _ in model.named_parameters()},
        offload_buffers=True,  # else it warns of them; they are small, and all on the device
    )
    torch_names: dict[int | str, str] = {
        i: device if name == own else f"cuda:{name}" for i, name in enumerate(gpus)
    }
    return {
        name: torch_names.get(place, str(place))
        for name, _ in model.named_parameters()
        for place in [_of(name, found)]
    }


def _of(name: str, device_map: Mapping[str, int | str | torch.device]) -> int | str:
    """The place of a parameter, or of the module around it that a device map names."""
    while name not in device_map:
        name = name.rpartition(".")[0]
    place = device_map[name]
    assert isinstance(place, int | str)
    return place


def _name(device: str) -> str:
    """A torch device as accelerate names it."""
    found = torch.device(device)
    if found.type == "cpu":
        return "cpu"
    return str(torch.cuda.current_device() if found.index is None else found.index)


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
