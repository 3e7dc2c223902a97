"""docs/faq.md quotes messages that the code raises, and that a test waits for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import registry
from safetensors.torch import load_file, save_file

from mergekit_wp.errors import UserError, option, spelled
from mergekit_wp.files.untrusted import parse_yaml
from mergekit_wp.models.pair import open_pair
from tests.models import make_model, perturbed, save

ROOT = Path(__file__).parents[1]
#: raised by mergekit
FOREIGN = {"Unimplemented merge method weight_patching"}
QUOTED = [
    quote
    for text in re.findall(r"\*\*`([^`]+)`\*\*", (ROOT / "docs" / "faq.md").read_text())
    if (quote := " ".join(text.split())) not in FOREIGN
]


def texts(folder: str) -> Iterator[str]:
    """Every text in the code but docstrings, with … for what is filled in."""
    for file in (ROOT / folder).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        formatted = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        skipped |= {id(part) for node in formatted for part in node.values}
        for node in formatted:
            yield "".join(_said(part) for part in node.values)
        for node in nodes:
            if isinstance(node, ast.Constant) and id(node) not in skipped:
                yield str(node.value)


def _said(part: ast.expr) -> str:
    """A piece of a formatted text; options by name as the command line spells them."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    call = getattr(part, "value", None)
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "option":
        given = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if len(given) == len(call.args):
            return spelled(option(*given), {})
    return "…"


RAISED = set(texts("mergekit_wp"))
EXPECTED = {text.replace("\\", "") for text in texts("tests")}


def pieces(text: str, least: int) -> set[str]:
    """What of a text is sure to stand in the message, as far as it is long enough to be telling."""
    found = {piece.strip() for piece in re.split(r"…|'[^']*'|\.\*|\|", text)}
    return {piece for piece in found if len(piece) >= least}


def test_quotes_are_found() -> None:
    assert len(QUOTED) >= 35 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quote", QUOTED)
def test_a_quote_is_in_the_code_word_for_word(quote: str) -> None:
    assert any(quote in text for text in RAISED)


@pytest.mark.parametrize("quote", QUOTED)
def test_a_quote_is_what_a_test_waits_for(quote: str) -> None:
    ours = pieces(quote, 12)
    assert any(
        any(piece in text for piece in ours) or any(piece in quote for piece in pieces(text, 14))
        for text in EXPECTED
    )


def test_aliases_that_multiply() -> None:
    lines = ["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for one, two in zip("abcde", "bcdef", strict=True):
        lines.append(f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]")
    with pytest.raises(ValueError, match=r"its aliases stand for .* values, more than 100000"):
        parse_yaml("\n".join(lines))


def test_a_tied_config_over_two_tensors(tmp_path: Path) -> None:
    base = make_model("llama-tied")
    save(base, tmp_path / "base", torch.float32)
    save(perturbed(base), tmp_path / "expert", torch.float32)
    for name in ("base", "expert"):
        weights = load_file(tmp_path / name / "model.safetensors")
        head = weights["model.embed_tokens.weight"] + (1.0 if name == "expert" else 0.0)
        save_file(weights | {"lm_head.weight": head}, tmp_path / name / "model.safetensors")
    words = (
        "expert': its config says that the output head is tied to the embedding, "
        "but lm_head.weight and model.embed_tokens.weight differ"
    )
    with pytest.raises(UserError, match=words):
        open_pair(str(tmp_path / "base"), str(tmp_path / "expert"), lambda *_: None)


def test_the_method_is_unknown_without_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._METHODS, "weight_patching", raising=False)
    (quote,) = FOREIGN
    with pytest.raises(RuntimeError, match=quote):
        registry.get("weight_patching")
