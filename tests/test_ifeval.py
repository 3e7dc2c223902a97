"""The six rules, on cases whose verdicts were read off IFEval's own code."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_wp.errors import UserError
from mergekit_wp.tasks.ifeval import RULES, follows

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("change_case:english_capital", {}, "ALL OF IT, 1 AND 2!", True),
    ("change_case:english_capital", {}, "MOSt OF IT", False),
    ("change_case:english_capital", {}, "123", False),
    ("punctuation:no_comma", {}, "a; b", True),
    ("punctuation:no_comma", {}, "a, b", False),
    ("detectable_format:title", {}, "<<a poem>>\ntext", True),
    ("detectable_format:title", {}, "text <<>> text", False),
    ("detectable_format:title", {}, "<< >>", False),
    ("detectable_format:title", {}, "<a poem>", False),
    ("detectable_format:title", {}, "<<a\npoem>>", False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        True,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nsection 2\nb",
        False,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 3},
        "Day1 a Day 2 b Day 3",
        True,
    ),
    ("startend:quotation", {}, ' "a b" ', True),
    ("startend:quotation", {}, '"a" b', False),
    ("startend:quotation", {}, '"', False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and b", False),
    # bold is found by IFEval's second pattern, and its halves (`**`) by neither
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**a** **b**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "* *", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a\nb*", False),
]


@pytest.mark.parametrize(("name", "kwargs", "response", "expected"), CASES)
def test_cases(name: str, kwargs: dict[str, Any], response: str, expected: bool) -> None:
    assert follows([name], [kwargs], response) == [expected]


def test_every_rule_has_a_case_both_ways() -> None:
    for name in RULES:
        assert {expected for rule, _, _, expected in CASES if rule == name} == {True, False}


def test_a_blank_response_follows_nothing_and_none_is_no_argument() -> None:
    assert follows(["punctuation:no_comma"], [{}], " \n") == [False]
    assert follows(["punctuation:no_comma"], [{"num_sections": None}], "a") == [True]
    assert follows(["punctuation:no_comma", "startend:quotation"], [{}, {}], "a") == [True, False]


def test_bad_input() -> None:
    with pytest.raises(UserError, match="unknown IFEval instruction 'language:x'; known are"):
        follows(["language:x"], [{}], "a")
    with pytest.raises(UserError, match="2 instructions with 1 kwargs"):
        follows(["punctuation:no_comma"] * 2, [{}], "a")
    with pytest.raises(UserError, match="multiple_sections'.*section_spliter"):
        follows(["detectable_format:multiple_sections"], [{"num_sections": 2}], "a")
