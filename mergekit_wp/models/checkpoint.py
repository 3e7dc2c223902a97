"""A checkpoint on disk or on the Hub, read lazily.

Tensors stream one at a time, piece by piece; those that are made of several stored ones through
mergekit's own loader. Only the model that receives the patches is held in memory, see `resident`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError

from mergekit_wp.architectures import text_config
from mergekit_wp.architectures.computation import VOLATILE_CONFIG
from mergekit_wp.errors import UserError
from mergekit_wp.models import hub
from mergekit_wp.models.generation import TextInterface, read_tokenizer
from mergekit_wp.models.load import read_config
from mergekit_wp.models.lora import Adapter
from mergekit_wp.models.parameter_names import StoredNames
from mergekit_wp.models.refusals import (
    FLOATS,
    headers,
    refuse_adapter_alone,
    refuse_pickles,
    refuse_quantised,
    refuse_quantised_weights,
    refuse_stand_ins,
    with_named_base,
)
from mergekit_wp.models.streaming import WHOLE, Pieces, Rows, Span, on_device

# numbers that are read at once where a tensor can be read in pieces
_PIECE = 2**21


def _model_path(path: str) -> ModelPath:
    """As mergekit reads it; a folder is one whatever characters are in its name.

    Raises:
        UserError: it looks like a folder, and there is none.
    """
    if os.path.isdir(path):
        return ModelPath.model_construct(path=path, revision=None)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"model folder '{path}' not found")
    return ModelPath.model_validate(path)


class Checkpoint:
    """One checkpoint, read lazily.

    Args:
        reference: a folder, or a Hub id as mergekit writes it (``owner/name@revision``); behind a
            ``+`` a LoRA adapter of it. An adapter's folder alone is taken with the model it names.

    Raises:
        UserError: it cannot be found, has no safetensors weights, or an adapter that does not fit.
    """

    def __init__(self, reference: str) -> None:
        self.name = reference = with_named_base(reference)
        whole = os.path.isdir(reference)
        model, plus, lora = (reference, "", "") if whole else reference.partition("+")
        try:
            self.ref = ModelReference(
                model=_model_path(model), lora=_model_path(lora) if plus else None
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model '{reference}': {error}") from error
        self.path = self._resolve()
        #: tensors of the model, as they are stored, that are in memory; see `keep`
        self.kept: dict[str, torch.Tensor] = {}
        self.loader = LazyTensorLoader(self._index(), lazy_unpickle=False)
        self.adapter = None
        if self.ref.lora is not None:
            self.adapter = Adapter.open(self.ref.lora.path, self.ref.lora.revision)
            for name in (*self.adapter.shapes, *self.adapter.saved):
                header = self.stored.header(name)
                self.adapter.check_fits(name, None if header is None else header[0])
            self.adapter.check_tying(tied=bool(self.text_config.tie_word_embeddings))

    def require_whole(self, purpose: str) -> None:
        """Refuse a model with an adapter.

        Raises:
            UserError: says for what it is refused.
        """
        if self.adapter is not None:
            raise UserError(
                f"{purpose} needs whole models, but '{self.name}' is a model with a LoRA adapter; "
                "merge the adapter into its model and give the folder of the result"
            )

    def _resolve(self) -> str:
        try:
            model = self.ref.model
            folder, self._commit = Path(model.path), None
            if not folder.is_dir():
                folder = hub.config_folder(model.path, model.revision)
                self._commit = hub.commit_of(folder)
            refuse_stand_ins(folder, f"model '{self.name}'")
            refuse_adapter_alone(folder, self.name)
            self.config: Any = read_config(folder, self.name)
            refuse_quantised(self.config, self.name)
            if self._commit is not None:  # weights of the same, whatever was pushed in between
                folder = hub.checkpoint(model.path, self._commit)
                refuse_stand_ins(folder, f"model '{self.name}'")
            return str(folder)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise UserError(f"model '{self.name}' cannot be read: {hub.no_model(error)}") from error

    def _index(self) -> Any:
        refuse_pickles(self.path, self.name)
        try:
            index = ShardedTensorIndex.from_disk(self.path)
        except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"model '{self.name}': weights cannot be read: {error}") from error
        refuse_quantised_weights(index, self.name)
        return index

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in a fixed order."""
        index = self.loader.index
        return [Path(index.base_path, s.filename) for s in index.shards]

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and stored dtype of every tensor.

        Raises:
            UserError: a weight file is missing, damaged, or not as the index says.
        """
        return headers(self.loader.index, self.name)

    @cached_property
    def stored(self) -> StoredNames:
        """Where the model's parameters are among the stored tensors."""
        return StoredNames(self.config, self.headers)

    @cached_property
    def _spans(self) -> dict[str, Span]:
        """Where every stored tensor lies in its file."""
        return {
            name: span for path in self.weight_files for name, span in Span.of_file(path).items()
        }

    def named_otherwise(self, name: str) -> str:
        """What errors say of a parameter that is stored behind other words, as wrappers do."""
        for stored in self.headers:
            if stored.endswith(f".{name}"):
                return (
                    f", but one called {stored}; save it again without the wrapper (of "
                    "torch.compile, FSDP, ...) that gave it this name"
                )
        return ""

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and stored dtype of one parameter.

        Raises:
            UserError: the checkpoint does not have it.
        """
        found = self.stored.header(name)
        if found is None:
            raise UserError(f"'{self.name}' has no tensor {name}{self.named_otherwise(name)}")
        return found

    @property
    def text_config(self) -> Any:
        """The config of the text model, which is all that is scored."""
        return text_config(self.config)

    @property
    def weights_dtype(self) -> str:
        """The most common stored dtype, as torch names it; of what an adapter changes, ours."""
        kinds = [dtype for _, dtype in self.headers.values()]
        most = max(sorted(set(kinds)), key=kinds.count)
        found = FLOATS.get(most, most)
        if self.adapter is not None and found in ("float16", "bfloat16"):
            return "float32"  # `Adapter.changed`: what merges it first will have rounded
        return found

    @property
    def config_hash(self) -> str:
        """sha256 of what the config says about the computation."""
        content = {k: v for k, v in self.config.to_dict().items() if k not in VOLATILE_CONFIG}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def revision(self) -> str | None:
        """The Hub commit that was read, of the adapter where there is one; None for a folder."""
        if self.adapter is not None:
            return self.adapter.commit
        return self._commit

    @property
    def architecture(self) -> str:
        """Class name of the model, as the config states it."""
        names = self.config.architectures or [f"model_type {self.config.model_type}"]
        return str(names[0])

    def weights_sha256(self) -> str:
        """Hash over the content of all weight files."""
        digest = hashlib.sha256()
        for file in self.weight_files:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        if self.adapter is not None:
            digest.update(self.adapter.sha256())
        return digest.hexdigest()

    def pieces(self, name: str) -> Pieces:
        """Pieces in which `piece` reads one parameter: rows, or all of it at once.

        Raises:
            UserError: the checkpoint does not have it.
        """
        shape = self.header(name)[0]
        if not shape or self.stored.name(name) is None:  # made of several stored tensors
            return WHOLE
        step = max(1, _PIECE // max(1, math.prod(shape[1:])))
        return [slice(start, start + step) for start in range(0, shape[0], step)]

    def piece(self, name: str, rows: Rows = ..., *, pin: bool = False) -> torch.Tensor:
        """Rows of one parameter as they are stored.

        Args:
            name: of the parameter.
            rows: of it.
            pin: in pinned memory, if they are read from the file as they are.
        """
        kept = self.kept.get(name)
        part = self._read(name, rows, pin=pin) if kept is None else kept[rows]
        return part if self.adapter is None else self.adapter.changed(name, part, rows)

    def _read(self, name: str, rows: Rows, *, pin: bool) -> torch.Tensor:
        """Rows of one parameter of the model, before an adapter changes it."""
        stored = self.stored.name(name)
        if stored is not None:
            return self._spans[stored].read(rows, pin=pin)
        part = self.stored.read(name, self.loader.get_tensor)[rows]
        self.loader.flush()
        return part

    def keep(self, name: str, *, pin: bool) -> None:
        """Read one parameter of the model for the last time.

        Args:
            name: of the parameter.
            pin: in pinned memory, from which copies to a GPU go on beside other work.
        """
        whole = self._read(name, ..., pin=pin)
        self.kept[name] = whole.pin_memory() if pin and not whole.is_pinned() else whole

    def on_device(
        self, name: str, device: torch.device | str, pieces: Pieces | None = None
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        """The `pieces` of one parameter, or given ones, on a device, as they are stored."""
        read = partial(self.piece, name, pin=torch.device(device).type == "cuda")
        return on_device(pieces or self.pieces(name), read, device)

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copy one parameter into a tensor of any dtype, on any device, piece by piece."""
        for rows, part in self.on_device(name, out.device):
            out[rows] = part

    def tensor(self, name: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """One parameter, cast and moved."""
        out = torch.empty(self.header(name)[0], dtype=dtype, device=device)
        self.read(name, out)
        return out

    def tokenizer(self) -> Any | None:
        """The checkpoint's tokenizer, None when it has none; its template's clock is `set_clock`'s.

        Raises:
            UserError: it has one that cannot be loaded.
        """
        adapter = [] if self.adapter is None else [self.adapter.folder]
        return read_tokenizer([*adapter, Path(self.path)], self.name)

    def interface(self) -> TextInterface | None:
        """How the checkpoint is asked, None when it has no tokenizer.

        Raises:
            UserError: a tokenizer or generation config that cannot be read.
        """
        tokenizer = self.tokenizer()
        return None if tokenizer is None else TextInterface.of(self.path, tokenizer)
