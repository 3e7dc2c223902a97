"""What the benchmarks' steps share: files, programs, the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.runs.warnings import emulated

REPO = Path(__file__).resolve().parents[1]
IFEVAL = REPO.parent / "shared" / "data" / "ifeval" / "input_data.jsonl"


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Bfloat16, but not where the CPU would take many times as long for it."""
    return torch.float32 if emulated(torch.bfloat16, device().type) else torch.bfloat16


def local(path: Path) -> str:
    """A path as it is typed at the repository's root; as it is where it lies elsewhere."""
    return str(path.relative_to(REPO) if path.is_relative_to(REPO) else path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows under the file's name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.replace(path)


def command(program: str, *arguments: str, quiet: bool = False) -> str:
    """Run an installed program, from the repository's root.

    Returns:
        What it printed, if quiet.

    Raises:
        SystemExit: it failed; what it printed is shown.
    """
    beside = Path(sys.executable).with_name(program)
    start = [str(beside)] if beside.exists() else [program]
    done = subprocess.run([*start, *arguments], cwd=REPO, capture_output=quiet, text=True)
    if done.returncode:
        shown = f"\n{done.stdout}{done.stderr}" if quiet else ""
        raise SystemExit(f"{program} {' '.join(arguments)} ended with {done.returncode}{shown}")
    return done.stdout or ""
