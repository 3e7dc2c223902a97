"""Two checkpoints on disk or on the Hub: reading and comparing.

Tensors stream one at a time through mergekit's own loaders; only the model that receives the
patches is held in memory, see `resident`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mergekit_wp import hub
from mergekit_wp.architectures import of_type, text_config
from mergekit_wp.components import Dims, Partition
from mergekit_wp.errors import UserError
from mergekit_wp.lora import Adapter
from mergekit_wp.stored import StoredNames
from mergekit_wp.unusable import (
    FLOATS,
    headers,
    refuse_pickles,
    refuse_quantised,
    refuse_quantised_weights,
)

#: part of a tensor along its first dimension, or all of it
Rows = slice | EllipsisType
Pieces = Sequence[Rows]
WHOLE: Pieces = (...,)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# config entries that change what the same weights compute, in any of the architectures
_COMPUTING = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "head_dim",
    "tie_word_embeddings",
    "use_bias",
    "use_parallel_residual",
    "use_bidirectional_attention",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "num_experts_per_tok",
    "norm_topk_prob",
    "attention_bias",
    "mlp_bias",
)
# config entries that say what tokens mean, not what weights compute
_HARMLESS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "architectures",
    "max_position_embeddings",
)
# numbers that are read at once where a tensor can be read in pieces
_PIECE = 2**21
# config entries that say how a checkpoint was saved, not what it computes
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


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
            ``+`` a LoRA adapter of it.

    Raises:
        UserError: it cannot be found, has no safetensors weights, or an adapter that does not fit.
    """

    def __init__(self, reference: str) -> None:
        self.name = reference
        whole = os.path.isdir(reference)
        model, plus, lora = (reference, "", "") if whole else reference.partition("+")
        try:
            self.ref = ModelReference(
                model=_model_path(model), lora=_model_path(lora) if plus else None
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model '{reference}': {error}") from error
        self.path = self._resolve()
        self.loader = LazyTensorLoader(self._index(), lazy_unpickle=False)
        self.adapter = None
        if self.ref.lora is not None:
            self.adapter = Adapter.open(self.ref.lora.path, self.ref.lora.revision)
            for name in self.adapter.shapes:
                header = self.stored.header(name)
                self.adapter.check_fits(name, None if header is None else header[0])

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
            self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            refuse_quantised(self.config, self.name)
            if self._commit is not None:  # weights of the same, whatever was pushed in between
                folder = hub.checkpoint(model.path, self._commit)
            return str(folder)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model '{self.name}' cannot be read: {reason}") from error

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

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and stored dtype of one parameter.

        Raises:
            UserError: the checkpoint does not have it.
        """
        found = self.stored.header(name)
        if found is None:
            raise UserError(f"'{self.name}' has no tensor {name}")
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
        content = {k: v for k, v in self.config.to_dict().items() if k not in _VOLATILE_CONFIG}
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

    def piece(self, name: str, rows: Rows = ...) -> torch.Tensor:
        """Rows of one parameter as they are stored; they may be mapped, so never change them.

        Mapped memory counts as this process's as far as it was ever read: let go of it soon.
        """
        stored = self.stored.name(name)
        if stored is None:
            part = self.stored.read(name, self.loader.get_tensor)[rows]
            self.loader.flush()
        else:
            index = self.loader.index
            with safe_open(Path(index.base_path, index.tensor_paths[stored]), "pt") as handle:
                part = handle.get_slice(stored)[rows]
        return part if self.adapter is None else self.adapter.changed(name, part, rows)

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copy one parameter into a tensor of any dtype, on any device, piece by piece."""
        for rows in self.pieces(name):
            out[rows] = self.piece(name, rows)

    def tensor(self, name: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """One parameter, cast and moved."""
        out = torch.empty(self.header(name)[0], dtype=dtype, device=device)
        self.read(name, out)
        return out

    def tokenizer(self) -> Any | None:
        """The checkpoint's tokenizer, None when it has none.

        Raises:
            UserError: it has one that cannot be loaded.
        """
        places = (
            [Path(self.path)] if self.adapter is None else [self.adapter.folder, Path(self.path)]
        )
        has = [p for p in places if any(Path(p, name).exists() for name in _TOKENIZER_FILES)]
        if not has:
            return None
        try:
            # said outright: by default transformers asks on the terminal about a folder's own code
            return AutoTokenizer.from_pretrained(has[0], trust_remote_code=False)
        except Exception as error:  # tokenizers raise whatever they like
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"the tokenizer of '{self.name}' cannot be loaded: {reason}") from error


@dataclass(frozen=True)
class Pair:
    """A base, an expert of the same architecture, and what differs between them."""

    base: Checkpoint
    expert: Checkpoint
    partition: Partition
    delta_norm: dict[str, float]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; without a map, what the config says."""
        architecture = self.partition.dims.architecture
        if architecture.mapped:
            return self.partition.shapes[f"{architecture.embedding}.weight"][0]
        return int(self.base.text_config.vocab_size)

    @property
    def changed(self) -> frozenset[str]:
        """Tensors in which the two differ at all."""
        return frozenset(name for name, norm in self.delta_norm.items() if norm > 0)

    def delta(self, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        """One tensor of the task vector, subtracted in `dtype` or fp32 if that is finer."""
        wide = torch.promote_types(dtype, torch.float32)
        difference = self.expert.tensor(name, wide, device)
        for rows in self.base.pieces(name):
            difference[rows] -= self.base.piece(name, rows).to(device, wide)
        return difference.to(dtype)

    def between(self, name: str, position: float, out: torch.Tensor) -> None:
        """Write base + position * (expert - base) into a tensor, computed at least in fp32."""
        wide = torch.promote_types(out.dtype, torch.float32)
        for rows in common_pieces(name, self.base, self.expert):
            base, expert = (
                side.piece(name, rows).to(out.device, wide) for side in (self.base, self.expert)
            )
            out[rows] = torch.lerp(base, expert, position)


def common_pieces(name: str, *sides: Checkpoint) -> Pieces:
    """Pieces in which a parameter can be read from all of some checkpoints."""
    found = [side.pieces(name) for side in sides]
    return WHOLE if WHOLE in found else found[0]


def parameter_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's own weights; tied copies are listed once."""
    return [name for name, _ in model.named_parameters()]


def open_pair(base_name: str, expert_name: str, on_tensor: Callable[[int, int], None]) -> Pair:
    """Open two checkpoints, compare every tensor and measure the task vector.

    Args:
        base_name: the base.
        expert_name: the expert.
        on_tensor: called after each tensor with how many are done and how many there are.

    Raises:
        UserError: another architecture or shape (names the first differing tensor and both
            shapes), NaN in the weights, or identical models.
    """
    base, expert = Checkpoint(base_name), Checkpoint(expert_name)
    if base.architecture != expert.architecture:
        raise UserError(
            f"different architectures: base '{base_name}' is {base.architecture}, "
            f"expert '{expert_name}' is {expert.architecture}"
        )
    _check_tying(base, expert)
    dims = Dims.from_config(base.config)
    names = parameter_names(skeleton(base.config))
    ours_too = set(names)
    theirs_only = [n for n in parameter_names(skeleton(expert.config)) if n not in ours_too]
    if theirs_only and base.text_config.num_hidden_layers != expert.text_config.num_hidden_layers:
        name = theirs_only[0]
        raise UserError(
            f"shapes differ at tensor {name}: base has none, expert {list(expert.header(name)[0])}"
        )
    vocabulary = (dims.architecture.embedding, dims.architecture.head)
    for name in names:
        shapes = []
        for side, checkpoint in (("base", base), ("expert", expert)):
            if (header := checkpoint.stored.header(name)) is None:
                raise UserError(f"{side} '{checkpoint.name}' has no tensor {name}")
            shapes.append(header[0])
        ours, theirs = shapes
        by_token = name in [f"{path}.weight" for path in vocabulary if dims.architecture.mapped]
        if by_token and ours[1:] == theirs[1:] and ours != theirs:
            raise UserError(
                f"base '{base.name}' has {ours[0]} rows for tokens, expert '{expert.name}' "
                f"{theirs[0]} ({name}): their vocabularies differ; write both with one "
                "vocabulary, as docs/faq.md shows, and score these"
            )
        if ours != theirs:
            raise UserError(
                f"shapes differ at tensor {name}: base {list(ours)}, expert {list(theirs)}"
            )
    _check_configs(base, expert)
    partition = Partition(dims, {name: base.header(name)[0] for name in names})
    assert partition.layouts  # refuses sizes that do not fit heads, groups or neurons
    norms = {}
    for done, name in enumerate(names, start=1):
        norms[name] = _compare(base, expert, name)
        on_tensor(done, len(names))
    if not any(norms.values()):
        raise UserError(
            f"nothing to score: base '{base_name}' and expert '{expert_name}' "
            "have identical weights"
        )
    return Pair(base, expert, partition, norms)


def _check_tying(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a tied model beside an untied one, and one that is not what its config says.

    transformers unties a model whose checkpoint holds another head than the embedding.
    """
    architecture = Dims.from_config(base.config).architecture
    names = [f"{path}.weight" for path in (architecture.embedding, architecture.head)]
    sides = (base, expert)
    tied = [bool(side.text_config.tie_word_embeddings) for side in sides]
    if tied[0] != tied[1]:
        one, other = sides if tied[0] else sides[::-1]
        raise UserError(
            f"the output head of '{one.name}' is tied to its embedding, that of '{other.name}' is "
            "not; untie the first, as docs/faq.md shows, or score another pair"
        )
    for side in sides if tied[0] and architecture.mapped else ():
        if all(side.stored.name(name) for name in names):
            for rows in side.pieces(names[0]):
                embedding, head = (side.piece(name, rows).float() for name in names)
                if torch.equal(embedding, head):
                    continue
                raise UserError(
                    f"model '{side.name}': its config says that the output head is tied to the "
                    f"embedding, but {names[1]} and {names[0]} differ; set tie_word_embeddings to "
                    "false in config.json, or save it anew"
                )


def _check_configs(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse experts whose config makes other computations of the same weights.

    The expert is run, and merged, under the base's config: with another one its scores would be
    those of a model that is not the expert.
    """
    ours: dict[str, Any] = Dims.from_config(base.config).numbers
    theirs: dict[str, Any] = Dims.from_config(expert.config).numbers
    computing: Iterable[str] = _COMPUTING
    if not Dims.from_config(base.config).architecture.mapped:
        both = {**base.config.to_dict(), **expert.config.to_dict()}
        computing = [key for key in both if key not in (*_VOLATILE_CONFIG, *_HARMLESS)]
    for key in computing:
        ours[key], theirs[key] = (getattr(c.text_config, key, None) or None for c in (base, expert))
    for key in ours:
        if ours[key] != theirs[key]:
            raise UserError(
                f"configs differ in {key}: base '{base.name}' has {ours[key]}, expert "
                f"'{expert.name}' has {theirs[key]}; both have to compute alike"
            )


def _compare(base: Checkpoint, expert: Checkpoint, name: str) -> float:
    sides = (("base", base), ("expert", expert))
    for side, checkpoint in sides:
        if (dtype := checkpoint.header(name)[1]) not in FLOATS:
            raise UserError(
                f"{side} '{checkpoint.name}': tensor {name} is stored as {dtype} (quantised?); "
                "give the unquantised checkpoint"
            )
    squares = []
    for rows in common_pieces(name, base, expert):
        x, y = (_finite(side, checkpoint, name, rows) for side, checkpoint in sides)
        squares.append(float((y.double() - x).square_().sum()))
    norm = math.sqrt(math.fsum(squares))
    assert math.isfinite(norm)
    return norm


def _finite(side: str, checkpoint: Checkpoint, name: str, rows: Rows) -> torch.Tensor:
    part = checkpoint.piece(name, rows)
    if not bool(torch.isfinite(part).all()):
        raise UserError(
            f"{side} '{checkpoint.name}': tensor {name} holds NaN or infinity; "
            "its weights are broken"
        )
    return part


def skeleton(config: Any) -> PreTrainedModel:
    """The text model with parameters on the meta device and real buffers."""
    config = text_config(config)
    architecture = of_type(config.model_type)
    implementation = None if architecture is None else architecture.attention_implementation
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, trust_remote_code=False
        )
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model
