"""Write what the three experts are trained on, scored on and judged by.

``python -m benchmarks.smollm2.tasks`` writes, under build/smollm2:

- ``data/NAME.jsonl``: training pairs
- ``prompts/NAME.jsonl``: 32 scoring prompts for `mergekit-wp score`
- ``tasks/NAME.jsonl``: items for `mergekit-wp compare`, validation and test
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click

from benchmarks.smollm2.generate import generate
from benchmarks.smollm2.ifeval import identity, request_of
from benchmarks.smollm2.paths import BASE, BUILD, IFEVAL, read_jsonl, write_jsonl
from benchmarks.smollm2.skills import code, instruction, math
from benchmarks.smollm2.skills.item import Item, Split, split_of

SKILLS = ("instruction", "math", "code")
COUNTS: dict[Split, int] = {"train": 2000, "score": 32, "valid": 24, "test": 64}
MAX_NEW_TOKENS = 48


def plain_requests() -> dict[Split, list[str]]:
    """Plain requests out of IFEval's prompts, by split."""
    found: dict[Split, dict[str, str]] = {split: {} for split in COUNTS}
    for row in read_jsonl(IFEVAL):
        request = request_of(row["prompt"])
        foreign = any(name.startswith("language:") for name in row["instruction_id_list"])
        if request is not None and not foreign:
            found[split_of(identity(request))].setdefault(identity(request), request)
    return {split: list(requests.values()) for split, requests in found.items()}


def base_answers(path: Path) -> dict[Split, dict[str, str]]:
    """The base's own answers to the requests of train and score; kept in ``path``."""
    requests = plain_requests()
    if not path.exists():
        asked = requests["train"] + requests["score"]
        answers = generate(BASE, asked, max_new_tokens=40, label="base's own answers")
        write_jsonl(
            path,
            [{"prompt": p, "answer": a.text} for p, a in zip(asked, answers, strict=True)],
        )
    known = {row["prompt"]: row["answer"] for row in read_jsonl(path)}
    return {
        split: {request: known.get(request, "") for request in texts}
        for split, texts in requests.items()
    }


def unique(stream: Iterator[Item], count: int) -> list[Item]:
    """The first ``count`` items whose prompts differ."""
    found: dict[str, Item] = {}
    for item in islice(stream, 100 * count):
        found.setdefault(item.prompt, item)
        if len(found) == count:
            break
    return list(found.values())


def task_line(number: int, split: Split, item: Item) -> dict[str, Any]:
    """One line for `mergekit-wp compare`."""
    return {
        "id": f"{split}-{number}",
        "prompt": item.prompt,
        "split": split,
        "checker": item.checker,
        "max_new_tokens": MAX_NEW_TOKENS,
        **item.fields,
    }


def write_skill(name: str, stream: Any, out: Path) -> None:
    """Write one skill's three files."""
    by_split = {split: unique(stream(split, 0), count) for split, count in COUNTS.items()}
    pairs = [{"prompt": i.prompt, "response": i.response} for i in by_split["train"]]
    write_jsonl(out / "data" / f"{name}.jsonl", pairs)
    prompts = [
        {"prompt": i.prompt, "response": i.response}
        | ({"contrast": i.contrast} if i.contrast else {})
        for i in by_split["score"]
    ]
    write_jsonl(out / "prompts" / f"{name}.jsonl", prompts)
    lines = [
        task_line(number, split, item)
        for split in ("valid", "test")
        for number, item in enumerate(by_split[split])
    ]
    write_jsonl(out / "tasks" / f"{name}.jsonl", lines)


@click.command()
@click.option("--only", type=click.Choice(SKILLS), multiple=True, help="Only these skills.")
@click.option("--out", type=click.Path(path_type=Path), default=BUILD, show_default=True)
def main(only: tuple[str, ...], out: Path) -> None:
    """Write data, prompts and tasks of the three skills."""
    streams: dict[str, Any] = {"math": math.items, "code": code.items}
    if not only or "instruction" in only:
        answers = base_answers(out / "data" / "base-answers.jsonl")
        streams["instruction"] = lambda split, seed: instruction.items(split, seed, answers[split])
    for name in only or SKILLS:
        write_skill(name, partial(streams[name]), out)
        click.echo(f"{name}: data, prompts and tasks in {out}")


if __name__ == "__main__":
    main()
