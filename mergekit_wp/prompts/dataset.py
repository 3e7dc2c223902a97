"""Rows of datasets: those on the Hub, and folders that `datasets` has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_wp.errors import UserError
from mergekit_wp.prompts.location import HUB, Location

#: files by which a folder of `save_to_disk` is known: of one split, and of several
_SAVED = ("state.json", "dataset_dict.json")


def rows(source: Location, where: str) -> Iterator[Any]:
    """The rows of one split.

    Raises:
        UserError: no such dataset, config, split or revision; several splits and none named.
    """
    from datasets import exceptions

    try:
        found = _folder(source, where) if source.kind == "folder" else _hub(source, where)
    except (OSError, ValueError, RuntimeError, exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "config name" in reason.lower():
            reason += f"; name one: {source.but(config='NAME')}"
        raise UserError(f"{where} cannot be read: {reason}") from error
    return (without_nulls(dict(row)) for row in found)


def _hub(source: Location, where: str) -> Any:
    import datasets

    asked = {"revision": source.revision}
    split = source.split
    if split is None:
        names = datasets.get_dataset_split_names(source.repository, source.config, **asked)
        split = _only(list(names), source, where)
    return datasets.load_dataset(source.repository, source.config, split=split, **asked)


def _folder(source: Location, where: str) -> Any:
    import datasets

    folder = Path(source.place)
    if not any((folder / name).is_file() for name in _SAVED):
        raise UserError(
            f"{where} is a folder, but none that datasets' save_to_disk has written; give one of "
            "its files"
        )
    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        if source.split is not None:
            raise UserError(f"{where} holds one dataset without splits; leave 'split' out")
        return found
    split = source.split or _only(list(found), source, where)
    if split not in found:
        raise UserError(f"{where} has no split '{split}'; it has {', '.join(found)}")
    return found[split]


def _only(splits: list[str], source: Location, where: str) -> str:
    if len(splits) != 1:
        raise UserError(
            f"{where} has the splits {', '.join(splits)}; name one: "
            f"{source.but(split=splits[0] if splits else 'NAME')}"
        )
    return splits[0]


def pinned(source: Location) -> Location:
    """A dataset on the Hub at its present commit, so that it can be read again.

    Anything else, and a dataset of which the Hub cannot tell now, as it is: whether what is read
    is the same is told by its hash.
    """
    if source.kind != "hub":
        return source
    import huggingface_hub

    errors = huggingface_hub.errors
    client: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        RuntimeError,
        *errors.HfHubHTTPError.__bases__,
    )
    try:
        found = huggingface_hub.HfApi().dataset_info(source.repository, revision=source.revision)
    except client:
        return source
    return source.model_copy(update={"revision": found.sha})


def pinned_text(written: str) -> str:
    """The spelling of a source at its present commit; of any but `hf:`'s as it is.

    Raises:
        UserError: it cannot be taken apart.
    """
    return pinned(Location.parse(written)).but() if written.startswith(HUB) else written


def without_nulls(value: Any) -> Any:
    """A row of Arrow without what is null within lists: there every object has every key."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: [_dropped(part) for part in each] if isinstance(each, list) else each
        for key, each in value.items()
    }


def _dropped(value: Any) -> Any:
    if isinstance(value, list):
        return [_dropped(part) for part in value]
    if isinstance(value, dict):
        return {key: _dropped(part) for key, part in value.items() if part is not None}
    return value
