"""Texts to token ids, as a tokenizer and its chat template write them at one date; their length.

The text is the prompt, then the response, then the end-of-sequence token. Both are tokenised as
one text and cut where the prompt ends: apart, a tokenizer may write either otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import torch

from mergekit_wp.architectures import text_config
from mergekit_wp.architectures.computation import RopeBorders
from mergekit_wp.errors import UserError, option
from mergekit_wp.prompts import Text


def today() -> str:
    """The date, or that of SOURCE_DATE_EPOCH (reproducible-builds.org).

    Raises:
        UserError: SOURCE_DATE_EPOCH is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(
            f"SOURCE_DATE_EPOCH is '{epoch}'; expected seconds since 1970, or nothing"
        ) from error
    return moment.date().isoformat()


class Clock:
    """One date, which chat templates read for the time, whenever they ask: its first moment.

    Args:
        date: as 2026-11-28.
        on_read: called when a template first writes something of it.

    Attributes:
        date: that it tells.
        was_read: whether a template has written something of it.
    """

    def __init__(self, date: str, on_read: Callable[[], object] = lambda: None) -> None:
        self.date, self.was_read, self._on_read = date, False, on_read

    def apply(self, plain: Callable[..., Any], template: str, *given: Any, **options: Any) -> Any:
        """What transformers writes by a template, at this date.

        Args:
            plain: its function, which takes a template.
            template: of a tokenizer.
            given: what the function takes.
            options: by name.
        """
        if _NAME not in template:
            return plain(*given, chat_template=template, **options)
        moment = datetime.fromisoformat(self.date)
        found = plain(*given, chat_template=_dated(moment) + template, **options)
        if not self.was_read:
            # no part of this date is the same, of whatever parts a template writes
            other = _dated(moment + timedelta(days=405))
            if plain(*given, chat_template=other + template, **options) != found:
                self.read()
        return found

    def read(self) -> None:
        """A template has written something of it, here or elsewhere."""
        if not self.was_read:
            self.was_read = True
            self._on_read()


# by which templates ask for the time in a form of `strftime`; transformers hands them no function
# of ours (since 5.24), so they are given a macro of that name
_NAME = "strftime_now"
_MACRO = (
    "{%- macro strftime_now(form) -%}{%- set it = namespace(text=form) -%}"
    "{%- for part, said in PARTS -%}{%- set it.text = it.text.replace(part, said) -%}{%- endfor -%}"
    "{{- it.text -}}{%- endmacro -%}{{ '' }}"
)
_PARTS = "aAbBcdfGHIjmMpSuUVwWxXyY"


def _dated(moment: datetime) -> str:
    """The beginning of a template that reads one moment."""
    said = {f"%{part}": moment.strftime(f"%{part}") for part in _PARTS}
    short = {f"%-{part}": said[f"%{part}"].lstrip("0") or "0" for part in "dHIjmMSUVWy"}
    every = {**said, **short, "%e": f"{moment.day:2}", "%z": "+0000", "%Z": "UTC", "%%": "%"}
    every |= {
        "%F": moment.strftime("%Y-%m-%d"),
        "%T": "00:00:00",
        "%D": moment.strftime("%m/%d/%y"),
    }
    return _MACRO.replace("PARTS", repr(list(every.items())))


# of all tokenizers that are opened meanwhile
_SHARED: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def one_clock(clock: Clock) -> Iterator[None]:
    """Have all tokenizers that are opened meanwhile read one clock."""
    before = _SHARED.set(clock)
    try:
        yield
    finally:
        _SHARED.reset(before)


def set_clock(tokenizer: Any, clock: Clock | None = None) -> None:
    """Give a tokenizer's chat template one date for today, whoever applies it.

    Args:
        tokenizer: whose template it is.
        clock: None for that of `one_clock`, else one of `today`.
    """
    chosen = clock or _SHARED.get() or Clock(today())
    plain = type(tokenizer).apply_chat_template.__get__(tokenizer)

    def apply(*given: Any, chat_template: str | None = None, **options: Any) -> Any:
        template = tokenizer.get_chat_template(chat_template, options.get("tools"))
        return chosen.apply(plain, template, *given, **options)

    tokenizer.apply_chat_template = apply


def encode_prompt(tokenizer: Any, text: Text) -> list[int]:
    """Token ids of a prompt, by the chat template when the tokenizer has one.

    Without an end token that the tokenizer adds to every text (``add_eos_token``, as training sets
    it): nothing goes on behind it.

    Raises:
        UserError: chat messages without a chat template, or no tokens.
    """
    written = _written(tokenizer, text)
    ids = _ids(tokenizer, written)
    if not tokenizer.chat_template and ids[-1:] == [tokenizer.eos_token_id]:
        own = list(tokenizer(written, add_special_tokens=False).input_ids)
        end = int(tokenizer.eos_token_id)
        ids = ids[: len(ids) - _trailing(ids, end) + _trailing(own, end)]
    if not ids:
        raise UserError(f"prompt {text!r:.80} has no tokens")
    return ids


def _trailing(ids: list[int], token: int) -> int:
    """How many times a token stands at the end."""
    return next((i for i, other in enumerate(reversed(ids)) if other != token), len(ids))


class Parts(NamedTuple):
    """Token ids of a prompt and of its response.

    Attributes:
        prompt: the tokens that end within the prompt.
        response: the others, one that begins within the prompt among them.
        as_alone: whether the prompt has the tokens that it has without a response.
    """

    prompt: list[int]
    response: list[int]
    as_alone: bool


def encode_pair(tokenizer: Any, text: Text, response: str) -> Parts:
    """Token ids of a prompt and its response, of the whole text, cut where the prompt ends.

    The response ends with the end-of-sequence token, where the tokenizer has one.

    Raises:
        UserError: as `encode_prompt`; one token is all of the prompt and begins the response.
    """
    alone, written = encode_prompt(tokenizer, text), _written(tokenizer, text)
    if tokenizer.chat_template:
        response = _answer(tokenizer, text, written, response)
    whole = _ids(tokenizer, written + response)
    cut = len(alone) if whole[: len(alone)] == alone else _cut(tokenizer, written, response, alone)
    if not cut:
        raise UserError(
            f"prompt {text!r:.80} and its response begin with one token, so that nothing is left "
            "to predict it from; end the prompt elsewhere, such as before a blank"
        )
    prompt, rest = whole[:cut], whole[cut:]
    end = tokenizer.eos_token_id
    if end is not None and rest[-1:] != [int(end)]:
        rest.append(int(end))
    return Parts(prompt, rest, prompt == alone)


def _ids(tokenizer: Any, written: str) -> list[int]:
    # a chat template writes the special tokens itself
    return list(tokenizer(written, add_special_tokens=not tokenizer.chat_template).input_ids)


def _cut(tokenizer: Any, written: str, response: str, alone: list[int]) -> int:
    """How many tokens of the whole text end within the prompt."""
    special = not tokenizer.chat_template
    if tokenizer.is_fast:
        found = tokenizer(
            written + response, add_special_tokens=special, return_offsets_mapping=True
        )
        ends = [end for _, end in found.offset_mapping]
    else:  # tokens that are those of the prompt alone
        both = zip(_ids(tokenizer, written + response), alone, strict=False)
        ends = [0 if ours == theirs else len(written) + 1 for ours, theirs in both]
    beyond = (i for i, end in enumerate(ends) if end > len(written))
    return next(beyond, len(ends))


def _written(tokenizer: Any, text: Text, answer: str | None = None) -> str:
    """A prompt, ready for its answer or with it, as the chat template writes it, if there is one.

    Raises:
        UserError: chat messages without a chat template, or some that it refuses.
    """
    if not tokenizer.chat_template:
        if isinstance(text, str):
            return text
        raise UserError(
            "these are chat messages, but the tokenizer has no chat template; give plain prompts, "
            "or models with a template"
        )
    messages: list[dict[str, Any]] = (
        [{"role": "user", "content": text}]
        if isinstance(text, str)
        else [m.model_dump(exclude_unset=True) for m in text]  # no key that the file has not
    )
    if answer is not None:
        said = {"role": "assistant", "content": answer}
        return _rendered(tokenizer, [*messages, said], asks=False)
    written = _rendered(tokenizer, messages)
    for number, message in enumerate(messages, start=1):
        content = message.get("content", "")
        if isinstance(content, str) or str(content) not in written:
            continue
        without = [*messages[: number - 1], message | {"content": ""}, *messages[number:]]
        if written.count(str(content)) > _rendered(tokenizer, without).count(str(content)):
            raise UserError(
                f"the chat template writes the 'content' of message {number} as "
                f"{str(content)!r:.60}, for it reads texts only; give a text"
            )
    return written


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], *, asks: bool = True) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except Exception as error:  # jinja templates raise whatever they like
        raise UserError(f"the chat template refuses prompt {messages!r:.80}: {error}") from error


def _answer(tokenizer: Any, text: Text, written: str, response: str) -> str:
    """The blanks around a response as the chat template writes them behind the prompt.

    As it is where the template does not go on from the prompt, or refuses an answer there.
    """
    words = response.strip()
    try:
        whole = _written(tokenizer, text, response)
    except UserError:
        return response
    before, found, after = whole.removeprefix(written).partition(words)
    if not (words and found and whole.startswith(written)) or before.strip():
        return response
    blanks = after[: len(after) - len(after.lstrip())]
    ended = bool(tokenizer.eos_token) and after.lstrip().startswith(tokenizer.eos_token)
    # what does not end with the end token may write its blanks after another one
    return before + words + (blanks if ended else response[len(response.rstrip()) :])


# --- how long a text may be --------------------------------------------------------------------

# a table of positions has as many rows as a context tokens, in OPT and its kin two more
_OFFSETS = (0, 2)


@dataclass(frozen=True)
class Context:
    """How many tokens a model is made for.

    Attributes:
        length: in tokens.
        ends: whether it has no positions beyond, so that more tokens are an error.
    """

    length: int
    ends: bool

    @classmethod
    def of(cls, model: Any) -> Context | None:
        """Of a model, with weights or without; None where nothing states it or it grows."""
        config = text_config(model.config)
        stated = getattr(config, "max_position_embeddings", None)
        if stated is None and isinstance(biased := getattr(config, "max_seq_len", None), int):
            return cls(biased, ends=True)  # MPT makes its biases for so many
        if not isinstance(stated, int) or RopeBorders.of(config).growing:
            return None
        rows = {stated + offset for offset in _OFFSETS}
        tokens = model.get_input_embeddings()
        learned = any(
            isinstance(module, torch.nn.Embedding) and module.num_embeddings in rows
            for module in model.modules()
            if module is not tokens
        )
        tables = any(
            stated in buffer.shape
            for name, buffer in model.named_buffers()
            if not name.endswith("inv_freq")
        )
        return cls(stated, learned or tables)


@dataclass(frozen=True)
class TextLength:
    """How many tokens a text has.

    Attributes:
        what: how errors call it.
        tokens: that it has.
        answer: most tokens of an answer to it that are to come.
    """

    what: str
    tokens: int
    answer: int = 0

    @property
    def positions(self) -> int:
        """Positions it takes: the last token of an answer is never read."""
        return self.tokens + max(0, self.answer - 1)


def too_long(model: Any, texts: Sequence[TextLength], name: str) -> str | None:
    """What to say of texts that are longer than a model was made for, None where none is.

    Args:
        model: of transformers, with weights or without.
        texts: that it is to run on.
        name: how errors call it.

    Raises:
        UserError: it has no positions for one; names that, its length and the limit.
    """
    context = Context.of(model)
    over = [text for text in texts if context and text.positions > context.length]
    if context is None or not over:
        return None
    first = over[0]
    what = f"{first.what} has {first.tokens} tokens"
    shorter = "shorten it"
    if first.answer:
        what += f", and its answer up to {first.answer}"
        if (room := context.length - first.tokens + 1) > 0:
            shorter += f", or give {option('max_new_tokens', room)}"
    what += f"; {name} is made for {context.length}"
    if context.ends:
        raise UserError(f"{what} and has no positions beyond; {shorter}")
    others = f" ({len(over)} texts are so long)" if len(over) > 1 else ""
    return f"{what}{others}: what it computes beyond may mean little"
