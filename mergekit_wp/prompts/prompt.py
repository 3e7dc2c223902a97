"""One prompt, and the prompts of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Tag,
    field_validator,
    model_validator,
)


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
        if value is not None and not isinstance(value, str) and not parts:
            raise ValueError("expected a text, a list of parts such as {'type': 'text'}, or null")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.model_extra:
            raise ValueError("expected 'content', or another key such as 'tool_calls'")
        return self


def _form(value: object) -> str:
    return "messages" if isinstance(value, list) else "text"


#: a text or chat messages; errors speak of the one that it seems to be
Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")], Discriminator(_form)
]


class Prompt(BaseModel):
    """A prompt, and what belongs to it; other keys are kept out."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    prompt: Text
    contrast: Text | None = None
    response: str | None = None

    @property
    def usable_contrast(self) -> bool:
        """Whether the contrast is there and differs from the prompt."""
        return bool(self.contrast) and self.contrast != self.prompt


@dataclass(frozen=True)
class PromptSet:
    """The prompts to use.

    Attributes:
        prompts: in order.
        sha256: of the canonical lines of all that the source gives, whatever it is kept in.
        source: where they came from, for messages.
        name: what their behaviour is called where nobody says otherwise.
        said: what was recognised, taken and skipped, in one line; "" of prompts in memory.
        plain: nothing of it needs to be said: a prompt file of our own, taken whole.
        raw: whether they are text that goes through no chat template, and are read from their
            first tokens on instead of answered.
    """

    prompts: tuple[Prompt, ...]
    sha256: str
    source: str
    name: str
    said: str = ""
    plain: bool = True
    raw: bool = False

    @property
    def digests(self) -> tuple[str, ...]:
        """`text_digest` of each."""
        return tuple(text_digest(prompt.prompt) for prompt in self.prompts)

    @property
    def responses(self) -> Literal["given", "expert", "mixed"]:
        """Whose answers the prompts go on with: the file's, the expert's own, or some of each."""
        given = sum(prompt.response is not None for prompt in self.prompts)
        return "given" if given == len(self.prompts) else "mixed" if given else "expert"


#: where prompts are (a path, or how `location.Location` is written), or the prompts themselves
PromptSource = Path | tuple[Prompt, ...]


def canonical(prompts: Sequence[Prompt]) -> str:
    """Prompts as a prompt file, one line each: sorted keys, nothing that is not there."""
    found = [prompt.model_dump(mode="json", exclude_none=True) for prompt in prompts]
    return "".join(json.dumps(p, sort_keys=True, ensure_ascii=False) + "\n" for p in found)


def text_digest(text: Text) -> str:
    """What tells whether two prompts ask the same, 16 hex digits.

    White space around a text does not count, and a chat of one user message is its text.
    """
    if not isinstance(text, str):
        told = [message.model_dump(mode="json", exclude_none=True) for message in text]
        alone = told[0] if len(told) == 1 else {}
        only = alone.get("content") if alone.get("role") == "user" else None
        text = only if isinstance(only, str) else json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
