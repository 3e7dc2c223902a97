"""What an expert or a merge costs in general: perplexity on plain text, beside the base's.

The text are IFEval's prompts themselves, read as running text without the chat format: written by
people, on many subjects, at hand offline. Prompts that ask for one of the six constraints are left
out, and so are those whose request an expert was trained or scored on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.files import IFEVAL, device, dtype, read_jsonl
from benchmarks.items import split_of
from benchmarks.perplexity import perplexity, ratio, surprise
from benchmarks.smollm2.ifeval import identity, request_of
from mergekit_wp.tasks.ifeval import RULES

TEXTS = 96


def plain_texts(rows: Sequence[dict[str, Any]], count: int = TEXTS) -> list[str]:
    """The ``count`` longest usable prompts; equal lengths in the order of their hashes.

    Args:
        rows: IFEval's prompts with their ``instruction_id_list``.
        count: at most so many.
    """
    usable = set()
    for row in rows:
        names = row["instruction_id_list"]
        request = request_of(row["prompt"])
        learnt = request is not None and split_of(identity(request)) in ("train", "score")
        foreign = any(name.startswith("language:") for name in names)
        if not (learnt or foreign or RULES.keys() & set(names)):
            usable.add(row["prompt"].strip())
    ordered = sorted(usable, key=lambda t: (-len(t), hashlib.sha256(t.encode()).hexdigest()))
    return ordered[:count]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--ifeval", type=click.Path(exists=True, path_type=Path), default=IFEVAL)
@click.option("--texts", default=TEXTS, show_default=True, help="At most so many.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write each text's.")
def main(folders: tuple[Path, ...], ifeval: Path, texts: int, out: Path | None) -> None:
    """Print the perplexity of the model FOLDERS, the base first."""
    chosen = plain_texts(read_jsonl(ifeval), texts)
    if not chosen:
        raise click.ClickException(f"{ifeval} holds no prompt without the six constraints")
    found: dict[str, np.ndarray] = {}
    click.echo(f"{'model':<34} perplexity  against the first, 95% interval")
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype())
        rows = found[str(folder)] = surprise(model.to(device()).eval(), tokenizer, chosen)
        line = f"{folder!s:<34} {perplexity(rows):<10.2f}"
        if len(found) > 1:
            value, low, high = ratio(rows, next(iter(found.values())))
            line += f"  x {value:.2f} [{low:.2f}, {high:.2f}]"
        click.echo(line.rstrip())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({name: rows.tolist() for name, rows in found.items()}))


if __name__ == "__main__":
    main()
