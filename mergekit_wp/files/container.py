"""What a score file is kept in: small tensors and one JSON text in a safetensors file.

A header can claim anything: sizes and shapes are checked before a tensor is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import written_whole

#: bytes of a header and of a file; a 70B model's take some 0.2 and 60 MB
HEADER_BYTES, FILE_BYTES = 2**24, 2**31
_DTYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "U8": "torch.uint8",
}
#: how names of tensors end that hold small counts, one byte each; all others hold float32
COUNTS = ".leads"

Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file's safetensors handle.

    Raises:
        UserError: unreadable, truncated or too large; does not name the file.
    """
    try:
        _check_size(path)
        handle = safetensors.safe_open(path, framework="pt")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # RuntimeError: mmap
        raise UserError(f"it is unreadable or truncated: {error}") from error
    with handle:
        yield handle


def _check_size(path: str | os.PathLike[str]) -> None:
    if (size := os.path.getsize(path)) > FILE_BYTES:
        raise UserError(f"it has {size} bytes, more than any such file ({FILE_BYTES})")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < header <= size:
        raise UserError(f"its header has {header} bytes, more than any such file ({HEADER_BYTES})")


def load(handle: Any, expected: Shapes) -> dict[str, torch.Tensor]:
    """All tensors of an `opened` file, which must be just the expected ones.

    Raises:
        UserError: see `check`.
    """
    parts = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
    found = {
        key: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
        for key, part in parts.items()
    }
    _check_layout(found, expected)
    tensors = {key: handle.get_tensor(key) for key in parts}
    _check_finite(tensors)
    return tensors


def check(tensors: Mapping[str, torch.Tensor], expected: Shapes) -> None:
    """Refuse other tensors than the expected ones.

    Raises:
        UserError: a missing, extra or misshapen tensor, another dtype than it should have, or a
            NaN.
    """
    found = {key: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
    _check_layout(found, expected)
    _check_finite(tensors)


def _check_layout(found: Mapping[str, tuple[tuple[int, ...], str]], expected: Shapes) -> None:
    for key, shape in expected.items():
        if key not in found:
            raise UserError(f"tensor '{key}' is missing; the manifest promises it")
        if found[key][0] != shape:
            raise UserError(f"tensor '{key}' has shape {found[key][0]}, not {shape}")
        dtype = "torch.uint8" if key.endswith(COUNTS) else "torch.float32"
        if found[key][1] != dtype:
            raise UserError(f"tensor '{key}' is {found[key][1]}, not {dtype}")
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"tensor '{extra[0]}' is not in the manifest")


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor '{key}' holds NaN or infinity")


def write(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a file under its name only when complete; the same content gives the same bytes.

    Raises:
        UserError: it cannot be written.
    """
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    with written_whole(path) as temporary:
        save_file(ordered, temporary, metadata=metadata)
