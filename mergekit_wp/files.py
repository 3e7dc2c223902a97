"""Files and folders that appear under their name only when complete."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mergekit_wp.errors import UserError

# weight files of an earlier merge into the same folder, which a loader might take for the new ones
_WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it on success and removed otherwise.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk its own way
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target} cannot be written: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target with the same last name, moved there on success.

    Whatever ends the work, nothing half-written remains.

    Raises:
        UserError: the folder cannot be made.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    try:
        staged = hidden / target.name
        yield staged
        _move(staged, target)
        missing = []
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in missing:
            folder.rmdir()


def _move(staged: Path, target: Path) -> None:
    """Move a finished model to its place; other files already there stay."""
    if not target.exists():
        staged.rename(target)
        return
    written = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    for path in list(target.iterdir()):
        if _WEIGHTS.match(path.name) and Path(path.name) not in written:
            path.unlink()
    for name in written:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, target / name)
