"""Prompt files: train, score, test, and IFEval's own capitals prompts.

No outside data: the responses to learn are the base model's own answers to the plain requests,
upper-cased where capitals were asked for and as they are where not.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import click

from benchmarks.files import IFEVAL, read_jsonl, write_jsonl
from benchmarks.smollm2.generate import generate
from benchmarks.smollm2.ifeval import CAPITALS, split_requests
from benchmarks.smollm2.paths import BASE, PROMPTS

#: how capitals are asked for in training and scoring, and, in other words, in the test
SEEN_PHRASINGS = (
    "Answer in all capital letters.",
    "Your entire response should be in English, and in all capital letters.",
    "Please use only uppercase letters in your answer.",
    "No lowercase letters are allowed in your response.",
    "Write everything in capital letters.",
    "Do not use any lowercase letters.",
    "Reply in all caps.",
    "Every letter of your answer should be a capital letter.",
    "The whole response must be in uppercase.",
    "Respond in English, with all letters capitalized.",
    "Use capital letters only, please.",
)
TEST_PHRASINGS = (
    "Make sure your whole reply is in English and in all capital letters.",
    "I want the answer in uppercase, with no lowercase letters at all.",
    "All letters of your output must be capitalized.",
)


def ask(requests: list[str], phrasings: tuple[str, ...]) -> list[dict[str, str]]:
    """Prompt and contrast rows: each request with an instruction, and without."""
    return [
        {"prompt": f"{request} {phrasing}", "contrast": request}
        for request, phrasing in zip(requests, cycle(phrasings), strict=False)
    ]


@click.command()
@click.option("--ifeval", type=click.Path(exists=True, path_type=Path), default=IFEVAL)
@click.option("--base", type=click.Path(exists=True, path_type=Path), default=BASE)
@click.option("--out", type=click.Path(path_type=Path), default=PROMPTS)
@click.option("--max-new-tokens", default=40, show_default=True)
def main(ifeval: Path, base: Path, out: Path, max_new_tokens: int) -> None:
    """Write train.jsonl, score.jsonl, test.jsonl and ifeval.jsonl to the folder OUT."""
    rows = read_jsonl(ifeval)
    splits = split_requests(rows)
    write_jsonl(out / "score.jsonl", ask(splits["score"], SEEN_PHRASINGS))
    write_jsonl(out / "test.jsonl", ask(splits["test"], TEST_PHRASINGS))
    capitals = [{"prompt": r["prompt"]} for r in rows if CAPITALS in r["instruction_id_list"]]
    write_jsonl(out / "ifeval.jsonl", capitals)

    answers = generate(
        base, splits["train"], max_new_tokens=max_new_tokens, label="base's own answers"
    )
    pairs = zip(ask(splits["train"], SEEN_PHRASINGS), answers, strict=True)
    train = [
        {**row, "plain": answer.text, "capitals": answer.text.upper(), "ended": answer.ended}
        for row, answer in pairs
        if answer.text
    ]
    write_jsonl(out / "train.jsonl", train)
    for name in ("train", "score", "test", "ifeval"):
        click.echo(f"{name}: {len(read_jsonl(out / f'{name}.jsonl'))} prompts")


if __name__ == "__main__":
    main()
