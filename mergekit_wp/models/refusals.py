"""Weights that cannot be scored or merged, told by config, index and headers alone.

Nothing is read but these: what is refused here is refused before the first tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_json

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# what GPTQ, AWQ, compressed-tensors, bitsandbytes and fp8 store beside or instead of a weight
_PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB")
# the files of a model or adapter that are read
_READ = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_WAY_OUT = (
    "differences of quantised weights are mostly rounding: give the checkpoint it was quantised "
    "from, and quantise the merge"
)


def refuse_stand_ins(folder: str | Path, what: str) -> None:
    """Refuse files of a model that are not there, though something of their name is.

    ``git clone`` without git-lfs leaves a few lines of text that point to a file, a pruned cache a
    link to nothing.

    Args:
        folder: of the model or adapter.
        what: it is, for the error.

    Raises:
        UserError: names the first such file.
    """
    for file in sorted(Path(folder).glob("*")):
        if not any(file.match(pattern) for pattern in _READ):
            continue
        if file.is_symlink() and not file.exists():
            raise UserError(
                f"{what}: {file} links to a file that is gone ({os.readlink(file)}); download or "
                "copy it again"
            )
        if file.is_file() and file.stat().st_size < _POINTER_BYTES:
            with file.open("rb") as handle:
                if handle.read(len(_POINTER)) == _POINTER:
                    raise UserError(
                        f"{what}: {file} is a Git LFS pointer, not the file itself; run "
                        f"'git lfs install' and 'git lfs pull' in {folder}, or download it again"
                    )


def refuse_adapter_alone(folder: str | Path, name: str) -> None:
    """Refuse an adapter where a model is wanted.

    Raises:
        UserError: says how a model with an adapter is written.
    """
    config = Path(folder, "adapter_config.json")
    if not config.is_file() or Path(folder, "config.json").exists():
        return
    base = named_base(config) or "BASE"
    raise UserError(
        f"model '{name}' is a LoRA adapter without its model; write '{base}+{name}'"
        + ("" if base != "BASE" else ", with the model it was trained on for BASE")
    )


def named_base(adapter_config: Path) -> str | None:
    """The model that an adapter says it was trained on, None where it does not."""
    try:
        stated = parse_json(adapter_config.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stated if isinstance(stated, str) and stated else None


def with_named_base(reference: str) -> str:
    """A folder that holds only an adapter, behind the model that the adapter was trained on.

    Args:
        reference: of a model; any but such a folder is given back.

    Returns:
        ``BASE+ADAPTER``, with a Hub id as peft wrote it, or a folder that is there from here or
        from the adapter's.

    Raises:
        UserError: the adapter does not say what it was trained on, or that folder is gone.
    """
    config = Path(reference, "adapter_config.json")
    if not config.is_file() or Path(reference, "config.json").exists():
        return reference
    named = named_base(config)
    if named is None:
        raise UserError(
            f"adapter '{reference}' does not say in {config.name} what it was trained on; write "
            f"'BASE+{reference}', with that model for BASE"
        )
    places = [Path(named).expanduser(), Path(reference, named)]
    if found := next((place for place in places if place.is_dir()), None):
        return f"{found}+{reference}"
    if named.startswith(("/", ".", "~")) or named.count("/") != 1:
        raise UserError(
            f"adapter '{reference}' was trained on '{named}', which is not there; write "
            f"'BASE+{reference}', with the folder of that model for BASE"
        )
    return f"{named}+{reference}"


def refuse_pickles(folder: str, name: str, *, lazily: bool = False) -> None:
    """Refuse a checkpoint whose weights are not all in safetensors files of its own folder.

    Looked at before mergekit makes its index, for which it opens a pickle, and follows an index of
    safetensors to whatever file that names.

    Args:
        folder: of the checkpoint.
        name: what the error calls it.
        lazily: pickles are let through, for mergekit's lazy reader, which builds nothing but
            tensors; read otherwise, a pickle is executed.

    Raises:
        UserError: pickled or no weights, an index that names other files, two sets of weights, or
            an adapter beside them.
    """
    whole = os.path.join(folder, "model.safetensors")
    index = f"{whole}.index.json"
    beside = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if beside and (os.path.isfile(whole) or os.path.isfile(index)):
        raise UserError(
            f"model '{name}' is a whole model with an adapter beside it: transformers reads the "
            "adapter and the model that it names, mergekit only the weights; move the adapter's "
            "files out of the folder, or write BASE+ADAPTER"
        )
    if os.path.isfile(index):
        try:
            files = set(parse_json(Path(index).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model '{name}': {index} is no index of weights: {error}") from error
        for file in files:
            if os.path.basename(str(file)) != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"model '{name}': its index names the weight file {file!r:.80}; only "
                    "safetensors files beside the index are read"
                )
        if os.path.isfile(whole):
            raise UserError(
                f"model '{name}' has model.safetensors and {os.path.basename(index)}, and programs "
                "differ in which they read; remove the one that is left over"
            )
    elif os.path.isfile(whole):
        return
    elif not any(Path(folder).glob("*.bin*")):
        raise UserError(
            f"model '{name}' has no model.safetensors, nor {os.path.basename(index)}; other "
            "formats are not read: save it with save_pretrained"
        )
    elif not lazily:
        raise UserError(
            f"model '{name}' has pickled weights, which are never loaded; "
            "save it again as safetensors"
        )


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse a checkpoint whose config says that it is quantised (GPTQ, AWQ, bitsandbytes, fp8).

    Args:
        config: of transformers.
        name: what the error calls the model.

    Raises:
        UserError: says how it is quantised.
    """
    parts = (config, getattr(config, "text_config", None))
    keys = ("quantization_config", "compression_config")  # the second of compressed-tensors once
    for stated in (getattr(part, key, None) for part in parts for key in keys):
        if stated:
            given = stated if isinstance(stated, Mapping) else vars(stated)
            method = given.get("quant_method") or given.get("quant_algo") or "an unnamed method"
            method = getattr(method, "value", method)
            raise UserError(f"model '{name}' is quantised ({method!s:.40}); {_WAY_OUT}")


def refuse_quantised_weights(index: ShardedTensorIndex, name: str) -> None:
    """Refuse weights stored as integers or in eight bits, which a merge would take for numbers.

    Not every quantised checkpoint says so in its config.

    Raises:
        UserError: names the first; or a weight file is missing or damaged.
    """
    for tensor, (_, dtype) in headers(index, name).items():
        if tensor.endswith(_PACKED):
            raise UserError(f"model '{name}' is quantised: it stores {tensor}; {_WAY_OUT}")
        if tensor.endswith(".weight") and dtype not in FLOATS:
            raise UserError(
                f"model '{name}': tensor {tensor} is stored as {dtype} (quantised?); {_WAY_OUT}"
            )


def width(dtype: str) -> int:
    """Bytes of one number of a stored dtype, as safetensors names it."""
    bits = re.search(r"[0-9]+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def headers(index: ShardedTensorIndex, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored dtype of every tensor that an index of safetensors files lists.

    Args:
        index: of mergekit.
        name: what errors call the model.

    Raises:
        UserError: a weight file is missing, truncated, or lacks a tensor that the index lists.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in index.shards:
        path = os.path.join(index.base_path, shard.filename)
        try:
            stored = stored_tensors(path)
        except FileNotFoundError:
            raise UserError(
                f"model '{name}': weight file {shard.filename} is missing; copy or download it "
                "again"
            ) from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"model '{name}': {shard.filename} is damaged: {error}") from error
        for tensor in shard.contained_keys:
            if tensor not in stored:
                raise UserError(
                    f"model '{name}': its index says that {tensor} is in {shard.filename}, which "
                    "does not hold it; copy or download the checkpoint again"
                )
            found[tensor] = stored[tensor]
    return found


def stored_tensors(path: str | Path) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Shape and stored dtype of every tensor in a safetensors file.

    Raises:
        OSError, SafetensorError: there is no such file, or it is damaged.
    """
    stat = os.stat(path)
    return _stored(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=512)
def _stored(
    path: str | Path, stamp: tuple[int, int, int]
) -> Mapping[str, tuple[tuple[int, ...], str]]:
    found = {}
    with safe_open(path, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            part = handle.get_slice(name)
            found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found
