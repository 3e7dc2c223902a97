"""What the fields of rows mean: a shape that they have, or fields that are named.

Nothing ambiguous is guessed: rows in which two shapes are found, or none, are refused by a
sentence that says which field to name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_wp.errors import UserError
from mergekit_wp.prompts.location import Location

#: a row's prompt, contrast and response, as far as it has them; or why it has no prompt
Found = dict[str, Any] | str
#: ShareGPT's names of who speaks, and those of chat templates
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
NO_PROMPT = "without a prompt"


@dataclass(frozen=True)
class RowShape:
    """Fields by which rows are known, and what they mean.

    Attributes:
        name: for the reader.
        needs: fields that rows of this shape have.
        may: fields that are read where they are there.
        read: what one row that has them says.
        own: prompt files as this package writes them, in which every object has a prompt.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Found]
    own: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """All that are read."""
        return (*self.needs, *self.may)

    def of(self, row: Any) -> Found:
        """What one row says. One without a field of another's shape is passed over."""
        missing = [field for field in self.needs if field not in row]
        return f"without '{missing[0]}'" if missing and not self.own else self.read(row)


def _prompt(row: Mapping[str, Any]) -> Found:
    return {key: row[key] for key in ("prompt", "contrast", "response") if key in row}


def _question(row: Mapping[str, Any]) -> Found:
    return {"prompt": row["question"], "response": row.get("answer")}


def _instruction(row: Mapping[str, Any]) -> Found:
    given, more = row["instruction"], row.get("input")
    both = isinstance(given, str) and isinstance(more, str) and more.strip()
    return {"prompt": f"{given}\n\n{more}" if both else given, "response": row.get("output")}


def conversation(messages: Any) -> Found:
    """Chat messages, as they are or as ShareGPT writes them: a last answer is the response."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return {"prompt": messages}
    chat = []
    for message in messages:
        if "from" in message:
            who = message["from"]
            if not isinstance(who, str) or who not in _ROLES:
                return f"with a message from {who!r:.40}"
            message = {"role": _ROLES[who], "content": message.get("value")}
        chat.append(message)
    if not chat or chat[-1].get("role") != "assistant":
        return {"prompt": chat}
    answer = chat.pop()
    if not isinstance(answer.get("content"), str) or answer.get("tool_calls"):
        return "whose last answer is no text"
    if not any(message.get("role") == "user" for message in chat):
        return "that begin with an answer"
    return {"prompt": chat, "response": answer["content"]}


def _of_conversation(field: str) -> Callable[[Mapping[str, Any]], Found]:
    return lambda row: conversation(row[field])


SHAPES = (
    RowShape("prompts", ("prompt",), ("contrast", "response"), _prompt, own=True),
    RowShape("questions and answers", ("question", "answer"), (), _question),
    RowShape("instructions (Alpaca)", ("instruction", "output"), ("input",), _instruction),
    RowShape("chats", ("messages",), (), _of_conversation("messages")),
    RowShape("chats (ShareGPT)", ("conversations",), (), _of_conversation("conversations")),
)
TEXTS = RowShape("texts", (), (), lambda text: {"prompt": text})


def recognised(rows: Iterable[Mapping[str, Any]], source: Location, where: str) -> RowShape:
    """The shape of rows: by the fields that the source names, else by those they have.

    Args:
        rows: objects by fields.
        source: names fields, or not.
        where: what messages call it.

    Raises:
        UserError: no shape fits, or two, or a named field is not there; says what to type.
    """
    fields = list(dict.fromkeys(str(key) for row in rows for key in row))
    named = {"prompt": source.prompt, "response": source.response, "contrast": source.contrast}
    for key, field in named.items():
        if field and field not in fields:
            raise UserError(
                f"{where} has no field '{field}', named by '{key}='; it has {_listed(fields)}"
            )
    if source.prompt is not None:
        return _named(_by_name(source.prompt), source)
    fitting = [shape for shape in SHAPES if set(shape.needs) <= set(fields)]
    if len(fitting) == 1:
        return _named(fitting[0], source)
    if fitting:
        ways = " or ".join(f"'{source.but(prompt=shape.needs[0])}'" for shape in fitting)
        raise UserError(
            f"{where} may hold {' or '.join(shape.name for shape in fitting)}; say which field "
            f"has the prompts: {ways}"
        )
    known = "; ".join("/".join(shape.fields) for shape in SHAPES)
    raise UserError(
        f"{where} has the fields {_listed(fields)}, which are none of the known ones ({known}); "
        f"name yours: '{source.but(prompt='FIELD', response='FIELD')}', the response only if there "
        "is one"
    )


def _by_name(field: str) -> RowShape:
    """Rows whose prompt is in one field: a text, or a chat."""
    if field == "prompt":
        return SHAPES[0]
    return RowShape(f"prompts in '{field}'", (field,), (), _of_conversation(field))


def _named(shape: RowShape, source: Location) -> RowShape:
    """A shape with response and contrast from the fields that a source names."""
    own = {k: f for k, f in (("response", source.response), ("contrast", source.contrast)) if f}
    if not own and source.response is None:
        return shape

    def read(row: Mapping[str, Any]) -> Found:
        found = shape.read(row)
        if isinstance(found, str):
            return found
        if source.response == "":
            found = found | {"response": None}
        return found | {key: row.get(field) for key, field in own.items()}

    needs = shape.needs if source.response is None else shape.needs[:1]
    may = tuple(f for f in shape.may if f not in ("response", "contrast", *own))
    return RowShape(shape.name, needs, (*may, *own.values()), read)


def _listed(fields: list[str]) -> str:
    return ", ".join(fields[:20]) + (", ..." if len(fields) > 20 else "") if fields else "none"
