"""IFEval's rules as plain functions of a response.

They follow google-research/instruction_following_eval (Zhou et al., arXiv 2311.07911), with one
thing left out: for `english_capital` IFEval also asks langdetect whether the response is English.
"""

from __future__ import annotations

from collections.abc import Callable

Rule = Callable[[str], bool]


def english_capital(response: str) -> bool:
    """All capital letters, and at least one (`change_case:english_capital`)."""
    return response.isupper()


def no_comma(response: str) -> bool:
    """No comma anywhere (`punctuation:no_comma`)."""
    return "," not in response


def capital_fraction(response: str) -> float:
    """Capitals among the cased letters; 0 without any. Unlike the rules, it sees near misses."""
    cased = [letter for letter in response if letter.isupper() or letter.islower()]
    return sum(letter.isupper() for letter in cased) / len(cased) if cased else 0.0


def rate(rule: Rule, responses: list[str]) -> float:
    """Fraction of responses that follow a rule; a blank response follows none, as in IFEval."""
    if not responses:
        raise ValueError("no responses")
    return sum(follows(rule, response) for response in responses) / len(responses)


def follows(rule: Rule, response: str) -> bool:
    """Whether a response follows a rule, the blank one never."""
    return bool(response.strip()) and rule(response)
