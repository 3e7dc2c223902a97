"""The prompts that a command is given: a file, or those of a built-in behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergekit_wp.errors import UserError, option


@contextmanager
def prompt_file(options: Mapping[str, Any]) -> Iterator[Path]:
    """The prompt file that was given, or one of a built-in behaviour while the context lasts.

    Raises:
        UserError: neither is given, or both; no such behaviour.
    """
    from mergekit_wp.tasks import behaviors

    prompts, builtin = options["prompts"], options["builtin"]
    if (prompts is None) == (builtin is None):
        raise UserError(
            f"give either {option('prompts', 'FILE.jsonl')} or {option('builtin', 'NAME')}"
        )
    if prompts is not None:
        yield prompts
        return
    assert builtin is not None
    with TemporaryDirectory() as scratch:
        path = Path(scratch, f"{builtin}.jsonl")
        path.write_text(behaviors.jsonl(behaviors.behavior(builtin).prompts()))
        yield path
