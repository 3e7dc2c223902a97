"""Bytes of files, read without safetensors, against what safetensors reads."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_wp.errors import UserError
from mergekit_wp.models.streaming import _THREADS, Rows, Span, _ahead, on_device

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors of every dtype and some shapes; odd sizes put them at odd places."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}/{shape}": torch.randn(shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for shape in ((7, 3), (5,), (), (3, 2, 4), (0, 4), (1, 1))
    }
    tensors["counts"] = torch.arange(3)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors", tensors


def test_rows_are_those_that_were_saved(file: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = file
    spans = Span.of_file(path)
    assert set(spans) == set(tensors) - {"counts"}
    for name, span in spans.items():
        tensor = tensors[name]
        assert torch.equal(span.read(...), tensor) and span.dtype == tensor.dtype, name
        for rows in (slice(0, 2), slice(1, 3), slice(2, 100)) if tensor.dim() else ():
            assert torch.equal(span.read(rows), tensor[rows]), (name, rows)


def test_a_file_that_changes(file: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = file
    last = max(Span.of_file(path).values(), key=lambda span: span.start)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"x\.safetensors has changed since this run opened it"):
        last.read(...)
    save_file(tensors, path)
    first = min(Span.of_file(path).values(), key=lambda span: span.start)
    save_file(tensors, path.with_name("new"))
    path.with_name("new").replace(path)  # equal in everything, and still another
    with pytest.raises(UserError, match=r"x\.safetensors has changed"):
        first.read(...)


def test_pieces_come_in_order() -> None:
    pieces = [slice(i, i + 1) for i in range(40)]
    found = list(on_device(pieces, lambda rows: torch.tensor([rows.start]), "cpu"))
    assert [rows for rows, _ in found] == pieces
    assert [int(part) for _, part in found] == list(range(40))


def test_threads_get_pieces_ahead_and_not_too_far() -> None:
    pieces, begun, at_once, most = [slice(i, i + 1) for i in range(100)], [], 0, 0
    lock = threading.Lock()

    def get(rows: Rows) -> torch.Tensor:
        nonlocal at_once, most
        assert isinstance(rows, slice)
        with lock:
            begun.append(rows.start)
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.002 if rows.start % 3 else 0.006)  # they end in another order
        with lock:
            at_once -= 1
        return torch.tensor([rows.start])

    found = []
    for rows, part in _ahead(pieces, get):
        assert len(begun) <= len(found) + 2 * _THREADS
        found.append((rows, int(part)))
    assert found == [(rows, i) for i, rows in enumerate(pieces)]
    assert 1 < most <= _THREADS


def test_a_thread_tells_what_fails() -> None:
    def get(rows: Rows) -> torch.Tensor:
        if rows == slice(30, 31):
            raise UserError("no such row")
        return torch.ones(4)

    with pytest.raises(UserError, match="no such row"):
        list(_ahead([slice(i, i + 1) for i in range(100)], get))
