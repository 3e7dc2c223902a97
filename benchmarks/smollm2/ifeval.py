"""Short plain requests out of IFEval's prompts, and their split into train, score and test.

An IFEval prompt is a request followed by format instructions. Its first sentence is kept when it
is a request by itself (a question or an imperative) and says nothing about format.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

Split = Literal["train", "score", "test"]
CAPITALS = "change_case:english_capital"

# a sentence ends at . ! ? outside double quotes, but not inside a word or after an initial
_SENTENCE = re.compile(r'(?:"[^"]*"|[^".!?]|\.(?=\w)|(?<=\b[A-Z])\.)+[.!?]')
_FORMAT = re.compile(
    r"\b(words?|sentences?|paragraphs?|letters|lower ?case|upper ?case|capital\w*|commas?|"
    r"bullets?|sections?|highlight\w*|markdown|json|html|xml|wrap\w*|quot\w*|placeholders?|"
    r"brackets?|titles?|post ?script|repeat\w*|keywords?|phrases?|languages?|translate|"
    r"respon[sd]\w*|entire|exactly|at least|at most|asterisk\w*|must|do not|don't|without|"
    r"format\w*|includ\w*|contain\w*|all caps|https?|following|below)\b|[*<>\[\]`]",
    re.IGNORECASE,
)
_IMPERATIVE = re.compile(
    r"(please )?(brainstorm|come up|compose|create|describe|draft|explain|generate|give|list|make|"
    r"name|plan|suggest|summari[sz]e|write)\b",
    re.IGNORECASE,
)


def request_of(prompt: str) -> str | None:
    """The plain request in a prompt's first sentence, or None where there is none."""
    match = _SENTENCE.match(prompt.strip().split("\n")[0])
    if match is None:
        return None
    sentence = match[0].strip()
    asks = sentence.endswith("?") or _IMPERATIVE.match(sentence)
    plain = sentence.isascii() and not sentence.isupper() and not _FORMAT.search(sentence)
    return sentence if asks and plain and 4 <= len(sentence.split()) <= 30 else None


def identity(request: str) -> str:
    """What makes two requests the same: their words."""
    return " ".join(re.findall(r"\w+", request.lower()))


def split_of(request: str) -> Split:
    """The split a request belongs to, by its hash: about 5/8 train, 1/8 score, 2/8 test."""
    bucket = int(hashlib.sha256(identity(request).encode()).hexdigest(), 16) % 8
    return "score" if bucket == 0 else "test" if bucket <= 2 else "train"


def split_requests(rows: list[dict[str, Any]]) -> dict[Split, list[str]]:
    """Requests by split, each once; those of IFEval's own capitals prompts are in none."""
    splits: dict[Split, list[str]] = {"train": [], "score": [], "test": []}
    seen = {
        identity(request)
        for row in rows
        if CAPITALS in row["instruction_id_list"] and (request := request_of(row["prompt"]))
    }
    for row in rows:
        request = request_of(row["prompt"])
        foreign = any(name.startswith("language:") for name in row["instruction_id_list"])
        if request is None or foreign or identity(request) in seen:
            continue
        seen.add(identity(request))
        splits[split_of(request)].append(request)
    return splits
