"""Checkpoints and score files on the Hugging Face Hub, and their commits."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub

from mergekit_wp.errors import UserError

_HUB_FILE = re.compile(r"^hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)$")

#: of a checkpoint; files in folders below (other formats, originals) are none of its own
_CHECKPOINT = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_NOT_OURS = ["*/*", "consolidated*"]
_ADAPTER = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "*.jinja",
]
#: what the Hub's client raises: for the network (by whichever HTTP library it uses) and the disk,
#: for what it was asked, and errors of its own
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    *huggingface_hub.errors.HfHubHTTPError.__bases__,
    *(
        error
        for error in vars(huggingface_hub.errors).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
)


def config_folder(repository: str, revision: str | None) -> Path:
    """The folder with the config of a checkpoint, by whose name its commit is known.

    Raises:
        OSError, ValueError: as huggingface_hub does.
    """
    file = huggingface_hub.hf_hub_download(repository, "config.json", revision=revision)
    return Path(file).parent


def checkpoint(repository: str, revision: str | None) -> Path:
    """The folder of a checkpoint in the local cache, fetched as far as it is not there.

    mergekit's own download leaves out chat templates, and takes pickles where there is nothing
    else.

    Raises:
        OSError, ValueError: as huggingface_hub does.
    """
    folder = huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=_CHECKPOINT, ignore_patterns=_NOT_OURS
    )
    return Path(folder)


def adapter(repository: str, revision: str | None) -> Path:
    """The folder of an adapter, likewise.

    Raises:
        OSError, ValueError: as huggingface_hub does.
    """
    return Path(
        huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_ADAPTER)
    )


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit in the local cache that a branch or tag points to, else the revision itself."""
    for file in ("config.json", "adapter_config.json"):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return commit_of(Path(cached).parent)
    return revision


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the local cache, None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def local_path(reference: str) -> str:
    """Absolute path of a score file; ``hf://owner/repo[@revision]/path`` is fetched.

    Args:
        reference: as a recipe writes it.

    Raises:
        UserError: a malformed or unreachable Hub reference.
    """
    if reference.startswith("hf://"):
        return _fetch(reference)
    return os.path.abspath(os.path.expanduser(reference))


@lru_cache(maxsize=256)
def _fetch(reference: str) -> str:
    match = _HUB_FILE.match(reference)
    if match is None:
        raise UserError(
            f"'{reference}' is not a Hub file; write hf://owner/repo[@revision]/FILE.safetensors"
        )
    repo, revision, filename = match.groups()
    try:
        return huggingface_hub.hf_hub_download(
            repo, filename, revision=unquote(revision) if revision else None
        )
    except CLIENT_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"score file {reference} could not be fetched: {reason}") from error
