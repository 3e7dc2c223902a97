"""What a killed run leaves behind, and how the next one goes on from it.

Finished blocks of a sweep are kept beside the output in ``FILE.partial/``, each written under a
temporary name and renamed, with the inputs they belong to. The folder goes away when the output
is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_wp.errors import DiskError, OutOfMemory, UserError, option
from mergekit_wp.files.atomic import (
    locked,
    naming_disk,
    refuse_locked,
    refuse_unwritable,
    synced,
)
from mergekit_wp.interrupts import Interrupted, finishing, unmasked
from mergekit_wp.models.encoding import today

#: of a changed input, characters that are shown; and of them, those before the first other one
_SHOWN, _BEFORE = 60, 30


def begun(output: Path | None, restart: bool) -> str:
    """The day on which the run began that will write a file: an earlier one's that it goes on from.

    Args:
        output: the file, None where none is written.
        restart: throw away what an earlier run left.
    """
    if output is not None and not restart:
        # what is damaged, `Journal` refuses
        with suppress(OSError, ValueError, KeyError, TypeError):
            header = json.loads((_partial(output) / "inputs.json").read_text())
            return datetime.fromisoformat(header["created"]).date().isoformat()
    return today()


def unfinished(output: Path) -> bool:
    """Whether an earlier run left something to go on from."""
    return (_partial(output) / "inputs.json").exists()


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


class Journal:
    """The partial results of one output file.

    Args:
        output: the file the run will write.
        inputs: everything the results depend on, as JSON values by name.
        restart: throw away what an earlier run left.
        created: the day on which the run began, see `begun`.

    Raises:
        UserError: an earlier run had other inputs (says which), or one is running now.
    """

    def __init__(
        self, output: Path, inputs: dict[str, Any], restart: bool, created: str | None = None
    ) -> None:
        self.output = output
        self.folder = _partial(output)
        self.inputs = inputs
        self.restart = restart
        self._made: list[Path] = []  # folders that were not there before
        #: the day the run began, so that a resumed run writes what an unbroken one would have
        self.created = created or today()

    def __enter__(self) -> Self:
        self._made = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            if self.output.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            with naming_disk(self.output):
                lock = locked(self.folder / "lock")
        except OSError as error:  # now, not after hours of work
            raise UserError(f"{self.output} cannot be written: {error.strerror}") from error
        if lock is None:
            raise UserError(f"another run is writing {self.output}; wait for it or stop it")
        self._lock = lock
        try:
            with naming_disk(self.folder):
                self._check_inputs()
        except DiskError as error:
            self.__exit__(DiskError, error, None)
            raise
        except BaseException:
            self._lock.release()
            raise
        return self

    def _check_inputs(self) -> None:
        stated = self.folder / "inputs.json"
        if self.restart:
            stated.unlink(missing_ok=True)
        if stated.exists():
            self.created = _of_these_inputs(self.folder, self.inputs)
            return
        for block in self.folder.glob("*.safetensors"):  # nobody knows what they belong to
            block.unlink()
        header = {"created": self.created, "inputs": self.inputs}
        temporary = stated.with_suffix(".tmp")
        temporary.write_text(json.dumps(header, indent=1, sort_keys=True))
        synced(temporary)
        os.replace(temporary, stated)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        blocks = [block.name for block in self.folder.glob("*.safetensors")]
        found = None if error is None else unmasked(error)
        if isinstance(found, UserError) and not isinstance(found, OutOfMemory):
            # a run of refused inputs will not go on; its expert's answers are no loss
            worthless = ("responses.", "batch-size.")
            blocks = [name for name in blocks if not name.startswith(worthless)]
        if kind is not None and not blocks:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made:
                with suppress(OSError):  # somebody else has put something there
                    folder.rmdir()
        elif isinstance(found, DiskError | Interrupted):
            found.kept = self.folder
        self._lock.release()
        if found is not None and found is not error:
            raise found from error

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left finished blocks."""
        return any(self.folder.glob("*.safetensors"))

    def has(self, key: str) -> bool:
        """Whether a block is finished."""
        return (self.folder / f"{key}.safetensors").exists()

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """A finished block, None when it still has to run."""
        if not self.has(key):
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged ({error}); add {option('restart', True)} to begin anew"
            ) from error

    def save(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a finished block.

        Raises:
            DiskError: the disk is full or failing; the block's own file is not left there.
        """
        temporary = self.folder / f"{key}.tmp"
        try:
            with naming_disk(self.folder):
                save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
                synced(temporary)
                os.replace(temporary, self.folder / f"{key}.safetensors")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def block(
        self, key: str, run: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """A block's result, from an earlier run or from now, and whether it is an earlier run's.

        A first Ctrl-C waits for the end of the block.

        Raises:
            Interrupted: after it.
        """
        found = self.load(key)
        if found is not None:
            return found, True
        with finishing():
            found = {name: value.cpu() for name, value in run().items()}
            self.save(key, found)
        return found, False

    def discard(self) -> None:
        """Remove the folder, all at once, now that the output is complete."""
        gone = self.folder.with_name(f".{self.output.name[:100]}.done")
        with finishing(last=True):
            shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
            self.folder.rename(gone)
            shutil.rmtree(gone)


def _of_these_inputs(folder: Path, inputs: Mapping[str, Any]) -> str:
    """The day on which the run began that is kept in a folder.

    Raises:
        UserError: it had other inputs, or says nothing that can be read.
    """
    stated = folder / "inputs.json"
    try:
        header = json.loads(stated.read_text())
        earlier, created = header["inputs"], str(header["created"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{stated} is damaged ({error}); add {option('restart', True)} to begin anew"
        ) from error
    if changed := list(_changes("", earlier, inputs)):
        raise UserError(
            f"{folder} holds a run with other inputs; changed: {', '.join(changed)}; "
            f"add {option('restart', True)} to begin anew, or choose another {option('out')}"
        )
    return created


def _changes(name: str, one: Any, other: Any) -> Iterator[str]:
    """What is not as it was: of an input by expert, the expert; of several, which."""
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _changes(f"{name} of {key}" if name else key, one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other) > 1:
        for number, pair in enumerate(zip(one, other, strict=True), 1):
            yield from _changes(f"{name} {number}", *pair)
    else:
        texts = str(one), str(other)
        alike = takewhile(lambda both: both[0] == both[1], zip(*texts, strict=False))
        at = max(0, len(list(alike)) - _BEFORE)
        was, now = ("…" * (at > 0) + text[at : at + _SHOWN] for text in texts)
        yield f"{name} ({was} -> {now})"


def check_output(output: Path, inputs: Callable[[], Mapping[str, Any]] | None) -> None:
    """Refuse what a journal would, without making or changing any file.

    Args:
        output: the file the run will write.
        inputs: everything the results depend on; asked only where an earlier run left something.
            None where that will be thrown away.

    Raises:
        UserError: see `Journal`; or the folder cannot be written to.
    """
    if output.is_dir():
        raise UserError(f"{output} cannot be written: it is a folder")
    folder = _partial(output)
    refuse_unwritable(folder, output)
    refuse_locked(folder / "lock", f"another run is writing {output}; wait for it or stop it")
    if inputs is not None and (folder / "inputs.json").exists():
        _of_these_inputs(folder, inputs())


class Unwritten(Journal):
    """The journal of a run that writes nothing: a block is held until it is used."""

    def __init__(self) -> None:
        self.created = today()
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()

    @property
    def resumed(self) -> bool:
        """Never."""
        return False

    def has(self, key: str) -> bool:
        """Whether a block is held."""
        return key in self._held

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """A block that is held; it is so no longer."""
        return self._held.pop(key, None)

    def save(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Hold a block."""
        self._held[key] = tensors

    def block(
        self, key: str, run: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """A block's result, which nobody asks for again."""
        found = self.load(key)
        if found is not None:
            return found, False
        with finishing():
            return {name: value.cpu() for name, value in run().items()}, False

    def discard(self) -> None:
        """There is nothing to remove."""
