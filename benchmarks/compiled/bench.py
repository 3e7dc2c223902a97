"""Does a score name the components that a compiler changed?

``python -m benchmarks.compiled.bench`` measures every pair of ``build/compiled`` that is not
measured yet, and prints the tables of README.md; `compiling` makes the pairs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import torch
from transformers.utils import logging

from benchmarks.compiled import tables
from benchmarks.compiled.decoys import with_decoys
from benchmarks.compiled.graph import judged, traced
from benchmarks.compiled.methods import scores
from benchmarks.compiled.pairs import Pair
from benchmarks.compiled.truth import truth

PAIRS = Path("build/compiled")


def measured(file: Path) -> dict[str, object]:
    """Scores of a pair by every method, as compiled and with decoys, and its circuit."""
    pair = Pair.read(file)
    known = truth(pair)
    found: dict[str, object] = {
        "program": pair.about["program"],
        "live": [c.name for c in known.live],
        "changed": sorted(known.changed),
        "active": sorted(known.active),
        "passing": sorted(known.passing),
    }
    if known.active:
        for name, one in (("compiled", pair), ("decoys", with_decoys(pair, known, 0))):
            with tempfile.TemporaryDirectory() as folder:
                by_method, sums = scores(one, known.live, Path(folder))
                found[name] = by_method
                found[f"completeness, {name}"] = sums
        with tempfile.TemporaryDirectory() as folder:
            circuit = traced(pair, Path(folder))
            found["circuit"] = None if circuit is None else judged(pair, known, circuit)
    return found


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default=PAIRS)
def main(pairs: Path) -> None:
    """Measure what is not measured yet, and print the tables."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for file in sorted(pairs.glob("*.safetensors")):
        out = file.with_suffix(".json")
        if not out.exists():
            click.echo(f"{file.stem} …", err=True)
            out.write_text(json.dumps(measured(file)))
    rows = [json.loads(out.read_text()) for out in sorted(pairs.glob("*.json"))]
    click.echo(tables.everything(rows))


if __name__ == "__main__":
    main()
