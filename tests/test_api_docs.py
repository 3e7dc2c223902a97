"""docs/api.md lists what the functions take; `python -m tests.test_api_docs` prints the table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from click import Context

import mergekit_wp as wp
from mergekit_wp.cli import cli
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.mechanism.request import AnchorRequest, TraceRequest, VerifyRequest
from mergekit_wp.options import INTERNAL
from mergekit_wp.scoring.request import ScoreRequest

PAGE = Path(__file__).parents[1] / "docs/api.md"
REQUESTS = {
    "score": ("score", ScoreRequest),
    "fit": ("fit", FitRequest),
    "compare": ("compare", CompareRequest),
    "verify": ("verify", VerifyRequest),
    "trace": ("trace", TraceRequest),
    "find_anchors": ("anchor", AnchorRequest),
}
#: of the command line alone, or given under another name
LEFT_OUT = {"recipes", "recipe", "builtin"}
#: inherited, and refused
REFUSED = {"fit": {"batch_size"}}


def rows() -> Iterator[str]:
    for name, (command, request) in REQUESTS.items():
        named = set(inspect.signature(getattr(wp, name)).parameters)
        others = named | LEFT_OUT | REFUSED.get(name, set())
        fields = [
            f"`{f}`"
            for f, info in request.model_fields.items()
            if INTERNAL not in info.metadata and f not in others
        ]
        yield f"| `{name}` | `{command}` | {', '.join(sorted(fields))} |"


def test_the_page_lists_every_option() -> None:
    page = PAGE.read_text()
    for row in rows():
        assert row in page, row


def test_the_page_names_every_function() -> None:
    page = PAGE.read_text()
    for name in dir(wp):
        assert f"wp.{name}" in page or name == "__version__", name


def test_pages_name_only_what_there_is() -> None:
    for page in (PAGE.parents[1] / "README.md", *PAGE.parent.glob("*.md")):
        named = set(re.findall(r"\bwp\.(\w+)", page.read_text()))
        assert named <= set(dir(wp)), f"{page}: {named - set(dir(wp))}"


def test_the_page_names_every_command() -> None:
    page = PAGE.read_text()
    for name in cli.list_commands(Context(cli)):
        assert f"`{name}`" in page or f"wp.{name}" in page, name


if __name__ == "__main__":
    print("\n".join(rows()))
