"""Characters and tasks of the zoo: pure, seeded, with disjoint splits.

Every skill is a stream of ``Item(prompt, answer)``. The split of an item is a hash of what the
skill works on (not of its order or its instruction), so a test input never occurs in training in
another guise: not as the copied string of another instruction, not as the sum the other way
round, not as another order of the same letters.
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Skill = Literal["inst", "math", "sort", "copy"]
Split = Literal["train", "valid", "test"]

SKILLS: tuple[Skill, ...] = get_args(Skill)
EXPERT_SKILLS: tuple[Skill, ...] = ("inst", "math", "sort")

END_OF_PROMPT = "="
COPY_MARK = "|"
SORT_MARK = "%"
UPPER, QUOTE, NO_VOWELS, STARRED = "^", '"', "~", "*"
INSTRUCTIONS = (UPPER, QUOTE, NO_VOWELS, STARRED)

CHARACTERS = (
    string.ascii_lowercase
    + string.ascii_uppercase
    + string.digits
    + "".join(INSTRUCTIONS)
    + COPY_MARK
    + SORT_MARK
    + "+"
    + END_OF_PROMPT
)
VOWELS = "aeiou"


@dataclass(frozen=True)
class Item:
    """One question: what the model reads and what it must write before its end of sequence.

    ``contrast`` is the same request without the instruction; ``echo`` is what a model answers
    that copies instead of doing the task.
    """

    prompt: str
    answer: str
    echo: str
    key: str
    contrast: str | None = None


def split_of(key: str) -> Split:
    """Return the split an input belongs to: one tenth test, one tenth valid, the rest train."""
    bucket = zlib.crc32(key.encode()) % 10
    if bucket == 0:
        return "test"
    return "valid" if bucket == 1 else "train"


def is_correct(answer: str, generated: str) -> bool:
    """Return whether the text up to the end of sequence is exactly the answer."""
    return generated == answer


def follow(text: str, instructions: str) -> str:
    """Return ``text`` written as the instruction characters ask."""
    if NO_VOWELS in instructions:
        text = "".join(c for c in text if c not in VOWELS)
    if UPPER in instructions:
        text = text.upper()
    if QUOTE in instructions:
        text = f"{QUOTE}{text}{QUOTE}"
    if STARRED in instructions:
        text = f"{STARRED}{text}{STARRED}"
    return text


def _letters(rng: random.Random) -> str:
    """Return 3 to 6 letters, at least one of them a vowel and one a consonant."""
    while True:
        text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
        if 0 < sum(c in VOWELS for c in text) < len(text):
            return text


def make_copy(rng: random.Random) -> Item:
    """Return a string to repeat: ``|word=`` answers ``word``."""
    text = _letters(rng)
    return Item(f"{COPY_MARK}{text}{END_OF_PROMPT}", text, text, text)


def make_inst(rng: random.Random) -> Item:
    """Return a string to repeat under one or two instructions: ``^|word=`` answers ``WORD``."""
    text = _letters(rng)
    wanted = "".join(rng.sample(INSTRUCTIONS, k=rng.randint(1, 2)))
    plain = f"{COPY_MARK}{text}{END_OF_PROMPT}"
    answer = follow(text, wanted)
    return Item(wanted + plain, answer, text, text, contrast=plain)


def make_math(rng: random.Random) -> Item:
    """Return a sum of two two-digit numbers, answered lowest digit first: ``17+25=`` is ``24``."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    text = f"{a}+{b}"
    key = f"{min(a, b)}+{max(a, b)}"
    return Item(f"{text}{END_OF_PROMPT}", str(a + b)[::-1], text, key)


def make_sort(rng: random.Random) -> Item:
    """Return different letters to put in order: ``%dbca=`` answers ``abcd``."""
    text = "".join(rng.sample(string.ascii_lowercase, k=rng.randint(3, 6)))
    answer = "".join(sorted(text))
    return Item(f"{SORT_MARK}{text}{END_OF_PROMPT}", answer, text, answer)


MAKERS: dict[Skill, Callable[[random.Random], Item]] = {
    "inst": make_inst,
    "math": make_math,
    "sort": make_sort,
    "copy": make_copy,
}


def items(skill: Skill, split: Split, seed: int) -> Iterator[Item]:
    """Yield items of one skill and split without end; the same seed gives the same items."""
    rng = random.Random(f"{skill}/{split}/{seed}")
    while True:
        item = MAKERS[skill](rng)
        if split_of(item.key) == split:
            yield item


def prompt_line(item: Item) -> dict[str, str]:
    """A line of a prompt file for `mergekit-wp score`."""
    contrast = {} if item.contrast is None else {"contrast": item.contrast}
    return {"prompt": item.prompt, "response": item.answer, **contrast}


def distinct_items(skill: Skill, split: Split, seed: int, count: int) -> list[Item]:
    """Return ``count`` items of one skill and split whose prompts all differ."""
    found: dict[str, Item] = {}
    for item in items(skill, split, seed):
        found.setdefault(item.prompt, item)
        if len(found) == count:
            break
    return list(found.values())
