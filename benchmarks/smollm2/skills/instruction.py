"""Requests under one of six IFEval constraints; the answers are made by rule from plain ones.

Requests come from IFEval's prompts (`ifeval.py`) and are split by their hash; so that a plain
answer can follow a rule, it is cut to its first sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.items import Item, Split

NUMBERS = ("one", "two", "three", "four")
#: constraint -> wordings, the last one kept for validation and test
WORDINGS: dict[str, tuple[str, ...]] = {
    "change_case:english_capital": (
        "Your entire response should be in English, and in all capital letters.",
        "Answer in all capital letters.",
        "Please use only uppercase letters in your answer.",
        "Make sure your whole reply is in all capital letters.",
    ),
    "punctuation:no_comma": (
        "In your entire response, refrain from the use of any commas.",
        "Do not use any commas in your response.",
        "You are not allowed to use any commas.",
        "Make sure you don't use any commas in your reply.",
    ),
    "detectable_format:title": (
        "Your answer must contain a title, wrapped in double angular brackets, such as "
        "<<poem of joy>>.",
        "Include a title wrapped in double angular brackets, i.e. <<title>>.",
        "Give it a title in double angular brackets, such as <<title>>.",
        "The reply must have a title contained in double angular brackets, such as <<a title>>.",
    ),
    "detectable_format:multiple_sections": (
        "Your response must have {num_sections} sections. Mark the beginning of each section with "
        "{section_spliter} X, such as: {section_spliter} 1.",
        "Write {num_sections} sections, each explicitly noted as {section_spliter} X.",
        "Divide it into {num_sections} sections that start with {section_spliter} X.",
        "It should have {num_sections} sections, and each section should start with "
        '"{section_spliter} X".',
    ),
    "startend:quotation": (
        "Wrap your entire response with double quotation marks.",
        "Put double quotation marks around your whole answer.",
        "Enclose your entire reply in double quotation marks.",
        "Make sure the whole response is wrapped in double quotation marks.",
    ),
    "detectable_format:number_highlighted_sections": (
        "Highlight at least {num_highlights} sections in your answer with markdown, i.e. "
        "*highlighted section*.",
        'Highlight at least {num_highlights} text sections using "*", for example *this*.',
        "Mark at least {num_highlights} parts with markdown, i.e. *highlighted part*.",
        "At least {num_highlights} sections should be highlighted with markdown such as "
        "*highlighted section*.",
    ),
}


def _highlight(text: str, number: int) -> str:
    """Asterisks around the first words, longest first, of ``number`` different places."""
    words = text.split(" ")
    while len(words) < number:
        words.append("indeed")
    chosen = sorted(sorted(range(len(words)), key=lambda i: -len(words[i]))[:number])
    return " ".join(f"*{w}*" if i in chosen else w for i, w in enumerate(words))


def _sections(text: str, section_spliter: str, num_sections: int) -> str:
    """The words dealt to numbered sections."""
    words = text.split(" ")
    size = max(1, -(-len(words) // num_sections))
    parts = [" ".join(words[i * size : (i + 1) * size]) or "More." for i in range(num_sections)]
    return "\n".join(f"{section_spliter} {i}\n{part}" for i, part in enumerate(parts, 1))


def _title(text: str) -> str:
    words = re.findall(r"[A-Za-z]+", text)[:3]
    return f"<<{' '.join(words).title() or 'Answer'}>>\n{text}"


REWRITE: dict[str, Callable[..., str]] = {
    "change_case:english_capital": lambda text: text.upper(),
    "punctuation:no_comma": lambda text: text.replace(",", ""),
    "detectable_format:title": _title,
    "detectable_format:multiple_sections": _sections,
    "startend:quotation": lambda text: '"' + text.replace('"', "'") + '"',
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlight(
        text.replace("*", ""), num_highlights
    ),
}


def first_sentences(text: str, words: int = 22) -> str:
    """The beginning of an answer on one line, up to a sentence's end where one is near."""
    kept = " ".join(text.split()).split(" ")[:words]
    short = " ".join(kept)
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)", short)]
    return short[: ends[-1]] if ends else short.rstrip(",;:") + "."


def options_of(constraint: str, rng: random.Random) -> dict[str, Any]:
    """Random kwargs, as IFEval names them."""
    if constraint == "detectable_format:multiple_sections":
        splitter = rng.choice(("SECTION", "Section", "PART", "Part"))
        return {"section_spliter": splitter, "num_sections": rng.randint(2, 3)}
    if constraint == "detectable_format:number_highlighted_sections":
        return {"num_highlights": rng.randint(1, 3)}
    return {}


def items(split: Split, seed: int, answers: Mapping[str, str]) -> Iterator[Item]:
    """Items of one split, without end, over the constraints in turn.

    Args:
        split: which.
        seed: of the draws.
        answers: the split's plain requests with the base's own answers (empty where none is
            needed: in test items).
    """
    rng = random.Random(f"instruction/{split}/{seed}")
    requests = sorted(answers)
    while True:
        for constraint, wordings in WORDINGS.items():
            request = rng.choice(requests)
            options = options_of(constraint, rng)
            unseen = split in ("valid", "test")
            wording = wordings[-1] if unseen else rng.choice(wordings[:-1])
            asked = wording.format(**options)
            plain = first_sentences(answers[request]) if answers[request].strip() else ""
            yield Item(
                prompt=f"{request} {asked}",
                response=REWRITE[constraint](plain, **options) if plain else "",
                checker="ifeval",
                key=request,
                fields={"instruction_id_list": [constraint], "kwargs": [options]},
                contrast=request,
            )
