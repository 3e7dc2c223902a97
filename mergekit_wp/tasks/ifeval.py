"""The six IFEval constraints that have stable anchors, as plain functions.

They follow google-research/instruction_following_eval (Zhou et al., arXiv 2311.07911,
Apache-2.0) character by character, with one thing left out: for ``english_capital`` IFEval also
asks langdetect whether the response is English.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_wp.errors import UserError


def english_capital(response: str) -> bool:
    """All capital letters, and at least one."""
    return response.isupper()


def no_comma(response: str) -> bool:
    """No comma anywhere."""
    return "," not in response


def title(response: str) -> bool:
    """A title in double angular brackets, such as ``<<poem of joy>>``."""
    found = re.findall(r"<<[^\n]+>>", response)
    return any(text.lstrip("<").rstrip(">").strip() for text in found)


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least ``num_sections`` sections, each begun by the splitter and a number.

    The keys are spelt as IFEval spells them.
    """
    sections = re.split(r"\s?" + section_spliter + r"\s?\d+\s?", response)
    return len(sections) - 1 >= num_sections


def quotation(response: str) -> bool:
    """The whole response in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """At least ``num_highlights`` parts in ``*asterisks*``; ``**bold**`` counts as well."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    count = sum(bool(text.strip("*").strip()) for text in single)
    count += sum(bool(text.removeprefix("**").removesuffix("**").strip()) for text in double)
    return count >= num_highlights


RULES: dict[str, Callable[..., bool]] = {
    "change_case:english_capital": english_capital,
    "punctuation:no_comma": no_comma,
    "detectable_format:title": title,
    "detectable_format:multiple_sections": multiple_sections,
    "startend:quotation": quotation,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
}


def follows(
    instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], response: str
) -> list[bool]:
    """Whether a response follows each instruction; a blank one follows none.

    Args:
        instruction_ids: IFEval's ``instruction_id_list``.
        kwargs: one mapping per instruction; entries that are None are left out, as in IFEval.
        response: the text to judge.

    Raises:
        UserError: an instruction that is none of the six, or kwargs that do not fit it.
    """
    if len(kwargs) != len(instruction_ids):
        raise UserError(f"{len(instruction_ids)} instructions with {len(kwargs)} kwargs")
    verdicts = []
    for name, options in zip(instruction_ids, kwargs, strict=True):
        if name not in RULES:
            raise UserError(f"unknown IFEval instruction '{name}'; known are {', '.join(RULES)}")
        given = {key: value for key, value in options.items() if value is not None}
        try:
            verdicts.append(bool(response.strip()) and RULES[name](response, **given))
        except (TypeError, re.error) as error:
            raise UserError(f"IFEval instruction '{name}': {error}") from error
    return verdicts
