"""What would be read of a source: for looking at, and as a prompt file."""

from __future__ import annotations

from mergekit_wp.errors import UserError, option
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.prompts.dataset import pinned_text
from mergekit_wp.prompts.prompt import PromptSet, Text, canonical
from mergekit_wp.prompts.read import read_prompts
from mergekit_wp.prompts.request import PromptsRequest

#: prompts that are shown, and characters of each of their texts
_EXAMPLES, _LONGEST = 3, 200


def look(request: PromptsRequest) -> PromptSet:
    """Read a source, and write its prompts where ``out`` says.

    Raises:
        UserError: see `read_prompts`; the file cannot be written.
    """
    source = type(request.source)(pinned_text(str(request.source)))
    found = read_prompts(source, request.max_prompts)
    if request.out is not None:
        if request.out.exists():
            raise UserError(f"{option('out', request.out)} exists already; give another file")
        with written_whole(request.out) as temporary:
            temporary.write_text(canonical(found.prompts), encoding="utf-8")
    return found


def described(found: PromptSet) -> str:
    """The first prompts in short, below what was recognised."""
    lines = [found.said]
    for number, prompt in enumerate(found.prompts[:_EXAMPLES], 1):
        lines.append("")
        for field in ("prompt", "contrast", "response"):
            if (text := getattr(prompt, field)) is not None:
                lines.append(f"{number} {field:<9}{_short(text)}")
    return "\n".join(lines)


def _short(text: Text) -> str:
    if not isinstance(text, str):
        text = " ".join(f"[{message.role}] {message.content}" for message in text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
