"""What a killed run leaves behind, and how the next one goes on from it.

Finished blocks of a sweep are kept beside the output in ``FILE.partial/``, each written under a
temporary name and renamed, with the inputs they belong to. The folder goes away when the output
is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_wp.errors import UserError


def _today() -> str:
    """The date, or that of SOURCE_DATE_EPOCH (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.date().isoformat()


class Journal:
    """The partial results of one output file.

    Args:
        output: the file the run will write.
        inputs: everything the results depend on, as JSON values by name.
        restart: throw away what an earlier run left.

    Raises:
        UserError: an earlier run had other inputs (says which), or one is running now.
    """

    def __init__(self, output: Path, inputs: dict[str, Any], restart: bool) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.inputs = inputs
        self.restart = restart
        self._made: list[Path] = []  # folders that were not there before
        #: the day the run began, so that a resumed run writes what an unbroken one would have
        self.created = _today()

    def __enter__(self) -> Self:
        try:
            if self.output.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            self._made = [folder for folder in self.folder.parents if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")
        except OSError as error:  # now, not after hours of work
            raise UserError(f"{self.output} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"another run is writing {self.output}; wait for it or stop it"
            ) from None
        if self.restart:
            for block in self.folder.glob("*.safetensors"):
                block.unlink()
            (self.folder / "inputs.json").unlink(missing_ok=True)
        self._check_inputs()
        return self

    def _check_inputs(self) -> None:
        stated = self.folder / "inputs.json"
        if stated.exists():
            try:
                header = json.loads(stated.read_text())
                earlier, self.created = header["inputs"], header["created"]
            except (ValueError, KeyError, TypeError) as error:
                self._lock.close()
                raise UserError(
                    f"{stated} is damaged ({error}); add --restart to begin anew"
                ) from error
            keys = sorted(set(earlier) | set(self.inputs))
            changed = [key for key in keys if earlier.get(key) != self.inputs.get(key)]
            if changed:
                self._lock.close()
                what = ", ".join(
                    f"{key} ({earlier.get(key)!s:.60} -> {self.inputs.get(key)!s:.60})"
                    for key in changed
                )
                raise UserError(
                    f"{self.folder} holds a run with other inputs; changed: {what}; "
                    "add --restart to begin anew, or choose another --out"
                )
            return
        temporary = stated.with_suffix(".tmp")
        header = {"created": self.created, "inputs": self.inputs}
        temporary.write_text(json.dumps(header, indent=1, sort_keys=True))
        os.replace(temporary, stated)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        blocks = [block.name for block in self.folder.glob("*.safetensors")]
        refused = kind is not None and issubclass(kind, UserError)
        if refused:  # a run of refused inputs will not go on; its expert's answers are no loss
            blocks = [name for name in blocks if not name.startswith("responses.")]
        if kind is not None and not blocks:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made:
                with suppress(OSError):  # somebody else has put something there
                    folder.rmdir()
        self._lock.close()

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left finished blocks."""
        return any(self.folder.glob("*.safetensors"))

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """A finished block, None when it still has to run."""
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); add --restart to begin anew") from error

    def save(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a finished block."""
        temporary = self.folder / f"{key}.tmp"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
        os.replace(temporary, self.folder / f"{key}.safetensors")

    def discard(self) -> None:
        """Remove the folder once the output is complete."""
        shutil.rmtree(self.folder)
