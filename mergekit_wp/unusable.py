"""Weights that cannot be scored or merged, told by config, index and headers alone.

Nothing is read but these: what is refused here is refused before the first tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from mergekit_wp.errors import UserError

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WAY_OUT = (
    "differences of quantised weights are mostly rounding: give the checkpoint it was quantised "
    "from, and quantise the merge"
)


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse a checkpoint whose config says that it is quantised (GPTQ, AWQ, bitsandbytes, fp8).

    Args:
        config: of transformers.
        name: what the error calls the model.

    Raises:
        UserError: says how it is quantised.
    """
    for part in (config, getattr(config, "text_config", None)):
        stated = getattr(part, "quantization_config", None)
        if stated:
            given = stated if isinstance(stated, Mapping) else vars(stated)
            method = given.get("quant_method") or given.get("quant_algo") or "an unnamed method"
            method = getattr(method, "value", method)
            raise UserError(f"model '{name}' is quantised ({method!s:.40}); {_WAY_OUT}")


def refuse_quantised_weights(index: ShardedTensorIndex, name: str) -> None:
    """Refuse weights stored as integers or in eight bits, which a merge would take for numbers.

    Raises:
        UserError: names the first; or a weight file is missing or damaged.
    """
    for tensor, (_, dtype) in headers(index, name).items():
        if tensor.endswith(".weight") and dtype not in FLOATS:
            raise UserError(
                f"model '{name}': tensor {tensor} is stored as {dtype} (quantised?); {_WAY_OUT}"
            )


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
            stat = os.stat(path)
            stored = _stored(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
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


@lru_cache(maxsize=512)
def _stored(path: str, stamp: tuple[int, int, int]) -> Mapping[str, tuple[tuple[int, ...], str]]:
    found = {}
    with safe_open(path, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            part = handle.get_slice(name)
            found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found
