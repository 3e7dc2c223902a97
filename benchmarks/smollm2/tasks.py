"""Write what the three experts are trained on, scored on and judged by.

``python -m benchmarks.smollm2.tasks`` writes the files of `benchmarks.items.write_skill` to
build/smollm2.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.files import IFEVAL, read_jsonl, write_jsonl
from benchmarks.items import Split, Stream, split_of, write_skill
from benchmarks.smollm2.generate import generate
from benchmarks.smollm2.ifeval import identity, request_of
from benchmarks.smollm2.paths import BASE, BUILD, SMOLLM2
from benchmarks.smollm2.skills import code, instruction, math

SKILLS = SMOLLM2.skills
COUNTS: dict[Split, int] = {"train": 2000, "score": 128, "valid": 24, "test": 64}
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


@click.command()
@click.option("--only", type=click.Choice(SKILLS), multiple=True, help="Only these skills.")
@click.option("--out", type=click.Path(path_type=Path), default=BUILD, show_default=True)
def main(only: tuple[str, ...], out: Path) -> None:
    """Write data, prompts and tasks of the three skills."""
    streams: dict[str, Stream] = {"math": math.items, "code": code.items}
    if not only or "instruction" in only:
        answers = base_answers(out / "data" / "base-answers.jsonl")
        streams["instruction"] = lambda split, seed: instruction.items(split, seed, answers[split])
    for name in only or SKILLS:
        write_skill(name, streams[name], out, COUNTS, MAX_NEW_TOKENS)
        click.echo(f"{name}: data, prompts and tasks in {out}")


if __name__ == "__main__":
    main()
