"""Files and folders that appear under their name only when complete."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from mergekit_wp.errors import DiskError, UserError, option
from mergekit_wp.interrupts import finishing

# weight files of an earlier merge into the same folder, which a loader might take for the new ones
_WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
# those of them by which a loader finds the weights at all
_ENTRY = re.compile(r"^(model|pytorch_model)\.(safetensors|bin)(\.index\.json)?$")
# names of the files that are being moved into a folder, for the run after one that is killed there
_MOVING = "moving"
# what a full or failing disk says, as against a path that cannot be written
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def disk_trouble(error: BaseException) -> str | None:
    """What ails the disk, None where an exception is about something else.

    safetensors reports the system's error as text, torch that a file did not grow as it should, or
    that its stream failed.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (stated := re.search(r"os error (\d+)", str(error))):
        number = int(stated[1])
    if isinstance(error, RuntimeError) and re.search("inline_container.cc|iostream", str(error)):
        number = errno.ENOSPC
    return os.strerror(number) if number in _DISK else None


@contextmanager
def naming_disk(target: Path) -> Iterator[None]:
    """Name what was being written where the disk is full or failing.

    Raises:
        DiskError: it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (trouble := disk_trouble(error)) is None:
            raise
        raise DiskError(f"{target} cannot be written: {trouble}") from error


def is_model(folder: Path) -> bool:
    """Whether a folder holds the weights of a model."""
    return os.path.isdir(folder) and any(_ENTRY.match(path.name) for path in folder.iterdir())


def refuse_existing(target: Path | None, overwrite: bool, names: Iterable[str] = ()) -> None:
    """Refuse to replace a finished file, or a model or other files in a folder.

    Args:
        target: what is to be written; None for nothing.
        overwrite: whether it may be replaced.
        names: of files that are to be written into a folder.

    Raises:
        UserError: it may not.
    """
    if target is None or overwrite:
        return
    found = f"{target} exists" if os.path.isfile(target) else ""
    if is_model(target):
        found = f"{target} holds a model"
    elif there := [name for name in names if (target / name).exists()]:
        ours = _half_moved(target)
        found = next((f"{target / name} exists" for name in there if name not in ours), "")
    if found:
        raise UserError(
            f"{found} already; add {option('overwrite', True)} to replace it, or choose "
            "another name"
        )


def synced(path: Path) -> None:
    """Wait until a file is on the disk: only then may it get its name, or a power cut empties it.

    Raises:
        OSError: it cannot be written there.
    """
    # Windows syncs only what is open for writing; elsewhere a file may be read-only
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it on success and removed otherwise.

    Raises:
        UserError: the folder or the file cannot be written.
        DiskError: the disk is full or failing.
    """
    temporary: Path | None = None
    try:
        with naming_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            synced(temporary)
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target} cannot be written: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def locked(path: Path) -> BaseFileLock | None:
    """Hold a lock until it is released or the process ends, however it ends.

    Args:
        path: the lock file, made with its folders where missing; its holder may remove it.

    Returns:
        None where another process holds it.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def refuse_locked(path: Path, said: str) -> None:
    """Refuse a lock file that another process holds; none is made.

    Args:
        path: the lock file.
        said: the refusal.

    Raises:
        UserError: it is held.
    """
    if path.exists():
        if (lock := locked(path)) is None:
            raise UserError(said)
        lock.release()


def refuse_unwritable(path: Path, target: Path) -> None:
    """Refuse a place where no file can be made, without making one.

    Args:
        path: of the file; folders above it may be missing.
        target: what errors call it.

    Raises:
        UserError: says why.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise UserError(f"{target} cannot be written: {why}")


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside the target with the same last name, moved there on success.

    Whatever ends the work, nothing half-written remains; what SIGKILL leaves, the next run with
    this target removes.

    Args:
        target: the folder.
        overwrite: replace files that are in it already.

    Raises:
        UserError: the folder cannot be made, another run is writing it, or files are in the way.
        DiskError: the disk is full or failing.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        hidden = _hidden(target)
        lock = locked(hidden / "lock")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    if lock is None:
        raise UserError(f"another run is writing {target}; wait for it or stop it")
    staged = _staged(target)
    try:
        for name in _half_moved(target):  # of a run that was killed, as is what it left there
            (target / name).unlink(missing_ok=True)
        (hidden / _MOVING).unlink(missing_ok=True)
        shutil.rmtree(staged.parent, ignore_errors=True)
        with naming_disk(target):
            staged.parent.mkdir()
            yield staged
            for path in staged.rglob("*"):
                if path.is_file():
                    synced(path)
            with finishing(last=True):
                _move(staged, target, overwrite)
        missing = []
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.release()
        if os.name == "nt":  # where no open file can be removed, so the lock stood in the way
            with suppress(OSError):
                (hidden / "lock").unlink(missing_ok=True)
                hidden.rmdir()
        for folder in missing:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def refuse_link_out(folder: Path, target: Path) -> None:
    """Refuse to write into a folder below the target that a link leads out of it.

    Raises:
        UserError: names the link.
    """
    if not folder.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{folder} leads out of {target} to {folder.resolve()}; remove that link")


def _beside(target: Path) -> Path:
    """A folder on the target's disk, from where files can be renamed into it."""
    parent = target.parent
    if target.is_dir() and target.stat().st_dev != parent.stat().st_dev:
        return target  # a disk of its own, or a link to one
    return parent


def _hidden(target: Path) -> Path:
    return _beside(target) / f".{target.name[:100]}.partial"


def _staged(target: Path) -> Path:
    return _hidden(target) / "new" / target.name


def _half_moved(target: Path) -> list[str]:
    """Names of the files that a run had moved into a folder when it was killed before the last."""
    try:
        names = (_hidden(target) / _MOVING).read_text(encoding="utf-8").split("\0")
    except OSError:
        return []
    moved = [name for name in names if not (_staged(target) / name).exists()]
    return moved if len(moved) < len(names) else []


def _refuse_in_the_way(staged: Path, target: Path, names: Iterable[Path], overwrite: bool) -> None:
    """Refuse before the first file is moved what a move would fail at, or replace unasked."""
    for path in staged.rglob("*"):
        place = target / path.relative_to(staged)
        if path.is_dir():
            refuse_link_out(place, target)
        if place.exists() and path.is_dir() != place.is_dir():
            kind = "folder" if place.is_dir() else "file"
            raise UserError(
                f"{place} is a {kind} and would be written; move it, or choose another name"
            )
    for name in names:
        if (place := target / name).exists():  # what stays as it is need not be asked about
            refuse_existing(place, overwrite or _same(staged / name, place))


def _same(one: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(one, other, shallow=False)


def _move(staged: Path, target: Path, overwrite: bool) -> None:
    """Move a finished model to its place; other files already there stay.

    A folder that is there already is without weights until all else is new, so that no loader
    takes a half of each for a model, wherever this is killed.
    """
    if not target.exists():
        staged.rename(target)
        return
    names = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    names.sort(key=lambda name: bool(_ENTRY.match(str(name))))
    _refuse_in_the_way(staged, target, names, overwrite)
    # files that are the same stay: they are not this merge's to take away, should it fail
    names = [n for n in names if _WEIGHTS.match(str(n)) or not _same(staged / n, target / n)]
    record = _hidden(target) / _MOVING
    record.write_text("\0".join(map(str, names)), encoding="utf-8")
    synced(record)
    for path in list(target.iterdir()):
        if _WEIGHTS.match(path.name):
            path.unlink()
    moved = list[Path]()
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:  # else a card and a config would stand there without a model
            path.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
        raise
