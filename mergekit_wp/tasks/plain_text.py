"""Plain text as a task: how well a model goes on with it, in nats a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_wp.errors import UserError
from mergekit_wp.models.encoding import TextLength, too_long
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split

#: tokens that are read together, and sequences of them
WINDOW, ROWS = 256, 8


@dataclass(frozen=True)
class PlainText:
    """A text file, one test item: its score is the mean log-probability of a token, in nats.

    It is read in windows of `WINDOW` tokens, the first of each given: the beginning of text, where
    the tokenizer writes one. Perplexity is exp(-score).
    """

    name: str
    fingerprint: str
    text: str

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> PlainText:
        """Read a text file.

        Raises:
            UserError: unreadable, no UTF-8, or empty.
        """
        try:
            content = path.read_bytes()
            text = content.decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text file {path} cannot be read: {error}") from error
        if not text:
            raise UserError(f"text file {path} is empty; expected running text")
        return cls(name or path.stem, hashlib.sha256(content).hexdigest(), text)

    def count(self, split: Split) -> int:
        """The whole text is one test item."""
        return 1 if split == "test" else 0

    def question(self, item: str) -> str:
        """The text is no question: its name."""
        return self.name

    def too_long(self, model: Any, tokenizer: Any) -> str | None:
        """Windows are cut to `WINDOW` tokens.

        Raises:
            UserError: the model has not even positions for these.
        """
        tokens = min(WINDOW, len(tokenizer(self.text)["input_ids"]))
        return too_long(model, [TextLength(f"text '{self.name}'", tokens)], "the model")

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        asked: TextInterface,
        split: Split,
        at_once: AtOnce | None = None,
    ) -> list[ItemScore]:
        """One item, the whole text: its score is the mean log-probability of a token, in nats.

        Raises:
            UserError: it is one token long.
            OutOfMemory: there is not even memory for one window.
        """
        ids = asked.tokenizer(self.text).input_ids
        if len(ids) < 2:
            raise UserError(f"text '{self.name}' is one token long; give running text")
        # models that are used to a beginning of text are poor without it
        first = ids[:1] if ids[0] == asked.tokenizer.bos_token_id else []
        rest, size = ids[len(first) :], WINDOW - len(first)
        windows = [[*first, *rest[at : at + size]] for at in range(0, len(rest), size)]
        memory = at_once or AtOnce(ROWS, lambda _: None)
        total, start = 0.0, 0
        while start < len(windows):
            some = windows[start : start + ROWS]
            found, read = memory.run(partial(_log_probability, model, some), len(some))
            total, start = total + found, start + read
        predicted = sum(len(window) - 1 for window in windows)
        return [ItemScore("text", total / predicted)]


def _log_probability(model: Any, windows: Sequence[Sequence[int]], size: int) -> tuple[float, int]:
    """Log-probability of all predicted tokens of the first windows, and how many windows."""
    some = windows[:size]
    width = max(map(len, some))
    # padding is on the right: causal attention never sees it
    ids = torch.tensor([[*w, *[0] * (width - len(w))] for w in some], device=model.device)
    logits, total = model(input_ids=ids, use_cache=False).logits, 0.0
    for row, own, window in zip(logits, ids, some, strict=True):
        # a window at a time: over a vocabulary of 262,000 all together are gigabytes twice over
        logp = row[: len(window) - 1].float().log_softmax(-1)
        total += float(logp.gather(-1, own[1 : len(window), None]).sum())
    return total, len(some)
