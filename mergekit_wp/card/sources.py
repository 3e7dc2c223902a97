"""The models a merge is made of: where they are, at which revision, under which licence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration

from mergekit_wp.models import hub

NOT_STATED, NOT_READ = "not stated", "could not be read"


@dataclass(frozen=True)
class Source:
    """One input model. ``on_hub`` tells a Hub id from a folder; ``licence`` is for reading."""

    path: str
    role: str
    on_hub: bool
    revision: str | None
    licence: str


def sources(config: MergeConfiguration) -> list[Source]:
    """Every model and adapter that a recipe names, the base first."""
    found: dict[tuple[str, str | None], Source] = {}
    for path, role in _paths(config):
        found.setdefault((path.path, path.revision), _source(path, role))
    return list(found.values())


def common_licence(found: list[Source]) -> str | None:
    """The licence that every input states, if it is one."""
    names = {source.licence for source in found}
    return names.pop() if len(names) == 1 and not names & {NOT_STATED, NOT_READ} else None


def _paths(config: MergeConfiguration) -> Iterator[tuple[ModelPath, str]]:
    models = sorted(config.referenced_models(), key=str)
    if config.base_model is not None:
        yield config.base_model.model, "base"
        models = [model for model in models if model != config.base_model]
    for model in models:
        yield model.model, "expert" if config.base_model is not None else "model"
        if model.lora:
            yield model.lora, "adapter"


def _source(path: ModelPath, role: str) -> Source:
    if os.path.exists(path.path):
        return Source(path.path, role, False, None, _licence(Path(path.path, "README.md")))
    commit = hub.cached_commit(path.path, path.revision)  # which the merge read
    return Source(path.path, role, True, commit, _hub_licence(path))


def _hub_licence(path: ModelPath) -> str:
    try:
        readme = hf_hub_download(path.path, "README.md", revision=path.revision)
    except LocalEntryNotFoundError:
        return NOT_READ
    except EntryNotFoundError:
        return NOT_STATED
    except hub.CLIENT_ERRORS:  # no network, a private repository: that loses no finished merge
        return NOT_READ
    return _licence(Path(readme))


def _licence(readme: Path) -> str:
    if not readme.is_file():
        return NOT_STATED
    try:
        stated = ModelCard.load(readme, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return NOT_READ
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(str(name) for name in names if name) or NOT_STATED
