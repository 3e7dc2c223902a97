"""How a source of prompts or items is written: ``PLACE?key=value&key=value``.

One spelling serves commands, stored commands and Python, also where a command takes several
sources, each with fields of its own. As in a URL, ``%`` escapes what would end a value.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from pydantic import Field, ValidationError

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import StrictModel, complaint

HUB, HARNESS = "hf:", "lm-eval:"
#: of files with rows, and of tasks of lm-eval
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
_YAML = (".yaml", ".yml")
#: how one is written, for errors
SPELLING = "'PLACE?key=value&key=value'"


class Location(StrictModel):
    """Where prompts or items are, and how to read them.

    Attributes:
        place: a file; a folder of `datasets`' ``save_to_disk``; ``hf:owner/name``; a task of
            lm-eval as ``lm-eval:NAME`` or its YAML file.
        prompt, response, contrast: fields that hold them, where the shape does not say; an empty
            `response` leaves answers out.
        config, split, revision: of a dataset.
        sample, seed: so many rows drawn at random, in the source's order.
        distinct: leave out what came before.
        checker: of items that name none.
    """

    place: str
    prompt: str | None = None
    response: str | None = None
    contrast: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sample: int | None = Field(default=None, ge=1)
    seed: int = 0
    distinct: bool = False
    checker: str | None = None

    @classmethod
    def parse(cls, written: Path | str) -> Location:
        """Take a spelling apart. What exists as a file is one, whatever its name.

        Raises:
            UserError: an unknown key, a bad value, or a key that this kind of source has no use
                for.
        """
        text = str(written)
        place, mark, query = text.rpartition("?")
        if not mark or "=" not in query or _exists(text):
            return cls(place=text)
        options: dict[str, str] = {}
        for part in query.split("&"):
            key, equals, value = part.partition("=")
            if not equals or key in options or key not in cls.known():
                raise UserError(
                    f"{text}: '{part}' cannot be read; expected {SPELLING} with each key once, of "
                    f"{', '.join(cls.known())}"
                )
            options[key] = unquote(value)
        try:
            source = cls.model_validate({"place": place, **options})
        except ValidationError as error:
            raise UserError(f"{text}: {complaint(error)}") from error
        source._check(options)
        return source

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """What may stand behind the question mark."""
        return tuple(name for name in cls.model_fields if name != "place")

    def _check(self, given: Collection[str]) -> None:
        useless = {
            "hub": (),
            "harness": ("prompt", "response", "contrast", "config", "revision"),
            "folder": ("config", "revision"),
            "file": ("config", "split", "revision"),
        }[self.kind]
        if found := [key for key in useless if key in given]:
            what = {"harness": "a task of lm-eval", "folder": "a folder", "file": "a file"}
            raise UserError(
                f"{self.place}: '{found[0]}' says nothing of {what[self.kind]}; leave it out "
                f"(a dataset on the Hub is {HUB}owner/name)"
            )

    @property
    def kind(self) -> Literal["hub", "harness", "folder", "file"]:
        """What reads it."""
        if self.place.startswith(HUB):
            return "hub"
        if self.place.startswith(HARNESS) or self.place.endswith(_YAML):
            return "harness"
        return "folder" if Path(self.place).is_dir() else "file"

    @property
    def name(self) -> str:
        """The last part of the place, without ending."""
        last = Path(self.place.removeprefix(HUB).removeprefix(HARNESS))
        if self.kind in ("hub", "folder"):
            return last.name
        return Path(last.stem).stem if last.suffix == ".gz" else last.stem

    @property
    def repository(self) -> str:
        """Of a dataset on the Hub, its id."""
        return self.place.removeprefix(HUB)

    def but(self, **changed: object) -> str:
        """The spelling with some keys changed."""
        given = self.model_dump(exclude_defaults=True, exclude={"place"}) | changed
        order = [key for key in self.known() if key in given]
        query = "&".join(f"{key}={_written(given[key])}" for key in order)
        return f"{self.place}?{query}" if query else self.place

    def drawn(self, count: int) -> list[int]:
        """Which of so many rows are taken, in order; all where none are to be drawn."""
        if self.sample is None or self.sample >= count:
            return list(range(count))
        return sorted(random.Random(self.seed).sample(range(count), self.sample))

    def where(self, noun: str) -> str:
        """What messages call it: ``prompt file p.jsonl``."""
        return f"{noun} {'file' if self.kind == 'file' else 'source'} {self.place}"


def _written(value: object) -> str:
    return "yes" if value is True else quote(str(value), safe="/:,[]@ +")


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
