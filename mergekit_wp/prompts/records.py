"""Rows of files: JSONL, JSON arrays, CSV, TSV, Parquet and plain text, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_json
from mergekit_wp.prompts.location import ENDINGS, HARNESS, HUB, Location

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
#: how files begin that are not read
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
#: bytes that a compressed file may have unpacked
_MOST = 2**30
_TABLES = {".csv": ("CSV", ","), ".tsv": ("TSV", "\t")}
#: what is read, for errors
FORMATS = "JSONL, a JSON array, CSV, TSV or plain text (.txt) in UTF-8, gzipped or not, or Parquet"


@dataclass(frozen=True)
class Records:
    """What a source holds, before anybody asks what its fields mean.

    Attributes:
        where: what messages call the source.
        form: what it is kept in.
        rows: each with its place, as in ``line 3``.
        table: every row has every field, so one without a value was not forgotten.
    """

    where: str
    form: str
    rows: tuple[tuple[str, Any], ...]
    table: bool = False


def read_records(source: Location, noun: str) -> Records:
    """The rows of any source.

    Args:
        source: where they are.
        noun: what they are, for messages: prompt or task.

    Raises:
        UserError: it cannot be read, or one of its lines.
    """
    where = source.where(noun)
    if source.kind == "file":
        form, rows = _file(Path(source.place), where)
        return Records(where, form, tuple(rows), form in ("CSV", "TSV", "Parquet"))
    if source.kind == "harness":
        from mergekit_wp.prompts import harness

        texts = harness.texts(source)
        return Records(where, "lm-eval", tuple((f"document {n}", t) for n, t in _counted(texts)))
    from mergekit_wp.prompts import dataset

    found = dataset.rows(source, where)
    return Records(where, "a dataset", tuple((f"row {n}", row) for n, row in _counted(found)), True)


def _file(path: Path, where: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """What a file is kept in, and its rows by place."""
    name = path.name.lower()
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content, name = _unpacked(content, where), name.removesuffix(".gz")
        for start, what in _REFUSED.items():
            if content.startswith(start):
                raise UserError(f"{where} is {what}; expected {FORMATS}: write it anew")
        if content.startswith(_PARQUET):
            return "Parquet", _parquet(content, where)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{where} cannot be read: there is no such file{_meant(path)}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    suffix = Path(name).suffix
    if suffix in _TABLES:
        form, delimiter = _TABLES[suffix]
        return form, _table(text, delimiter, where)
    if suffix == ".txt":
        lines = _lines(text)
        return "plain text, a prompt a line", lines
    if text.lstrip().startswith("["):
        return "a JSON array", _array(text, where)
    return "JSONL", _jsonl(text, where)


def _unpacked(content: bytes, where: str) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(_MOST + 1)
    if len(unpacked) > _MOST:
        raise UserError(f"{where} unpacks to more than {_MOST >> 20} MiB; give a part of it")
    return unpacked


def _meant(path: Path) -> str:
    """What the name may have meant, where it is no file: several, or nothing that has an ending."""
    parts = str(path).split(",")
    if len(parts) > 1 and all(Path(part.strip()).exists() for part in parts):
        return "; it looks like several: give the option once for each"
    if path.name.lower().endswith(ENDINGS):
        return ""
    return f"; a dataset on the Hub is {HUB}OWNER/NAME, a task of lm-eval {HARNESS}NAME"


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank; splitlines() would cut at U+2028 too."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.removesuffix("\r")


def _jsonl(text: str, where: str) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(text):
        try:
            yield place, parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{where}, {place}: not JSON ({error}); expected one JSON object a line, or one "
                "array of objects (plain text, a prompt a line, is read from a file that ends in "
                ".txt)"
            ) from error


def _array(text: str, where: str) -> Iterator[tuple[str, Any]]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"{where}: not JSON ({error}); it begins as one array, expected to end as one"
        ) from error
    return ((f"record {n}", row) for n, row in _counted(found))


def _table(text: str, delimiter: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by the header's names; an empty cell is no value."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in lines:
            if not any(cells):
                continue
            place = f"line {lines.line_num}"
            if not header:
                header = [name.strip() for name in cells]
                if "" in header or len(set(header)) < len(header):
                    raise UserError(
                        f"{where}, {place}: expected a header with a name for each column, each "
                        f"another; it has {', '.join(map(repr, header))}"
                    )
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}, {place}: {len(cells)} cells under a header of {len(header)}; a cell "
                    "with separators or line breaks stands in double quotes"
                )
            yield place, {k: v or None for k, v in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{where}, line {lines.line_num}: {error}") from error


def _parquet(content: bytes, where: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    from mergekit_wp.prompts.dataset import without_nulls

    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is a Parquet file that cannot be read: {reason}") from error
    return ((f"row {n}", without_nulls(row)) for n, row in _counted(rows))


def _counted(rows: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(rows, 1)
