"""Checkpoints and score files on the Hugging Face Hub, and their commits."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mergekit_wp.errors import UserError

_HUB_FILE = re.compile(r"^hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)$")

# the address of a repository in that of a request
_ASKED = re.compile(r"(https?://[^/\s]+)/(?:api/models/)?([^/\s]+/[^/\s]+)/(?:resolve|revision)/")

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
#: how reasons begin why there is nothing
UNREACHED = "the Hub, which is not in reach, has left nothing of that name in the cache"
NO_REPOSITORY = "there is no such repository"
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


def reason(error: BaseException) -> str:
    """Why something of the Hub, or a file of a model, could not be read, and what to do.

    huggingface_hub says it in lines below the first; where it found nothing in its cache, only in
    what that error was raised from.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and isinstance(error, LocalEntryNotFoundError):
        return UNREACHED
    if cause is None:
        return " ".join(str(error).split()) or type(error).__name__
    said = " ".join((cause.server_message or str(cause)).split())
    match cause:
        case GatedRepoError():
            asked = _ASKED.search(str(cause))
            page = f" at {asked[1]}/{asked[2]}" if asked else ""
            return (
                f"it is gated: accept its licence{page}, and log in with 'hf auth login' ({said})"
            )
        case DisabledRepoError():
            return f"its author has disabled it ({said})"
        case RepositoryNotFoundError():
            return (
                f"{NO_REPOSITORY} on the Hub; if it is a private one, log in with "
                f"'hf auth login' ({said})"
            )
        case RevisionNotFoundError():
            return f"the repository has no such revision ({said})"
        case RemoteEntryNotFoundError():
            return f"the repository has no such file ({said})"
    advice = {
        401: "you are not logged in: log in with 'hf auth login', or set HF_TOKEN",
        403: "your token may not do this: make one that may write at "
        "https://huggingface.co/settings/tokens",
        429: "the Hub's rate limit is reached: log in with 'hf auth login', or wait",
    }.get(0 if cause.response is None else cause.response.status_code)
    return said if advice is None else f"{advice} ({said})"


def no_model(error: BaseException) -> str:
    """The `reason` why a model cannot be read whose reference may have been meant as a folder."""
    said = reason(error)
    found_nothing = said.startswith((UNREACHED, NO_REPOSITORY))
    return f"there is no such folder, and {said}" if found_nothing else said


def config_folder(repository: str, revision: str | None) -> Path:
    """The folder with the config of a checkpoint, by whose name its commit is known.

    Of an adapter the folder with its own config.

    Raises:
        OSError, ValueError: as huggingface_hub does.
    """
    try:
        file = huggingface_hub.hf_hub_download(repository, "config.json", revision=revision)
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        found = _adapter_config(repository, revision, offline)
        if found is None:
            raise
        file = found
    return Path(file).parent


def _adapter_config(repository: str, revision: str | None, offline: bool) -> str | None:
    try:
        return huggingface_hub.hf_hub_download(
            repository, "adapter_config.json", revision=revision, local_files_only=offline
        )
    except EntryNotFoundError:
        return None


def checkpoint(
    repository: str, revision: str | None, *, cache: str | None = None, pickles: bool = False
) -> Path:
    """The folder of a checkpoint in the local cache, fetched as far as it is not there.

    mergekit's own download leaves out chat templates, and asks the Hub what there is, which it
    cannot without a network.

    Args:
        repository: its id.
        revision: of it.
        cache: another than huggingface_hub's own.
        pickles: fetched too, where there is nothing else.

    Raises:
        OSError, ValueError: as huggingface_hub does.
    """

    def fetch(*weights: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache,
                allow_patterns=[*_CHECKPOINT, *weights],
                ignore_patterns=_NOT_OURS,
            )
        )

    folder = fetch()
    if pickles and not any(folder.glob("*.safetensors")):
        folder = fetch("*.bin")
    return folder


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
        raise UserError(f"score file {reference} could not be fetched: {reason(error)}") from error
