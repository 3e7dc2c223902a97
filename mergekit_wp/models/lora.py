"""LoRA adapters as peft writes them, read as low-rank changes: W + scale · B A, tensor by tensor.

Modules that an adapter saves whole stand in for the model's own.

Neither the merged model nor a full task vector is ever made: a weight is changed when it is asked
for. What an adapter holds beside plain LoRA is refused by name, never left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_json
from mergekit_wp.models import hub
from mergekit_wp.models.refusals import refuse_stand_ins, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
_WHOLE = re.compile(r"^base_model\.model\.((?!.*lora_).+\.(weight|bias))$")
# settings with which W + scale · B A is still all that the adapter does, whatever their value:
# what it was trained on and how, what its tensors say themselves, and what is honoured below
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_alpha",
        "modules_to_save",
        "rank_pattern",
        "use_rslora",
    }
)
# any other setting, known today or not, has to be off, or have one of these values
_OFF: tuple[Any, ...] = (None, False, [], {})
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # other initialisations change the base's weights as well, and an adapter does not say how
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: where it is.
        name: what errors call it.
        commit: on the Hub, None for a folder.
        config: of peft.
        shapes: of A and of B by the name of the parameter they change.
        saved: shapes of the parameters that it holds whole: ``modules_to_save``, and embeddings.
    """

    folder: Path
    name: str
    commit: str | None
    config: dict[str, Any]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    saved: dict[str, tuple[int, ...]]
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str, revision: str | None) -> Adapter:
        """Open an adapter in a folder or on the Hub.

        Raises:
            UserError: it cannot be read, or is more than plain LoRA; names what.
        """
        folder, name = _folder(path, revision), f"adapter '{path}'"
        config = _config(folder, name)
        if (kind := config.get("peft_type")) != "LORA":
            raise UserError(f"{name} is of type {kind}; only LORA adapters can be read")
        for key, value in config.items():
            if key not in _HARMLESS and not _among(value, (*_OFF, *_PLAIN.get(key, ()))):
                raise UserError(
                    f"{name} has {key} = {json.dumps(value):.200}, which is not known to be plain "
                    "LoRA; merge it into its model and give the folder of the result"
                )
        _check_numbers(config, name)
        commit = None if Path(path).is_dir() else hub.commit_of(folder)
        return cls(folder, name, commit, config, *_shapes(folder / WEIGHTS, name))

    def check_fits(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Refuse a parameter that the model does not have, or has in another shape.

        Raises:
            UserError: names it.
        """
        if shape is None:
            raise UserError(
                f"{self.name} changes {name}, of which its model has no weight of its own (a head "
                "may be tied, or the vocabulary resized); merge it into its model and give the "
                "folder of the result"
            )
        if name in self.saved:
            if self.saved[name] != shape:
                raise UserError(
                    f"{self.name} does not fit: its {name} is {list(self.saved[name])}, that of "
                    f"its model {list(shape)}"
                )
            return
        (rank, inputs), (outputs, rank_too) = self.shapes[name]
        expected = (inputs, outputs) if self._transposed else (outputs, inputs)
        if rank != rank_too or expected != shape:
            raise UserError(
                f"{self.name} does not fit: lora_A is {[rank, inputs]} and lora_B "
                f"{[outputs, rank_too]}, but {name} is {list(shape)}"
            )

    def check_tying(self, tied: bool) -> None:
        """Refuse an embedding held whole beside a head that is tied to it.

        Which of the two peft then keeps depends on its version.

        Raises:
            UserError: names the embedding.
        """
        for name in self.saved if tied else ():
            if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
                raise UserError(
                    f"{self.name} holds {name} whole, but the output head of its model is tied to "
                    "it; merge it into its model and give the folder of the result"
                )

    @property
    def _transposed(self) -> bool:
        return bool(self.config.get("fan_in_fan_out"))

    def changed(
        self, name: str, weight: torch.Tensor, rows: slice | EllipsisType = ...
    ) -> torch.Tensor:
        """Rows of a parameter with the adapter's change, at least in fp32; others as they are."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if name in self.saved:
            [whole] = self._tensors(f"base_model.model.{name}")
            return whole[rows].to(weight.device, wide)
        found = self.factors(name)
        if found is None:
            return weight
        left, right, scale = found
        left, right = (side.to(weight.device, wide) for side in (left, right))
        delta = left[rows] @ right
        return torch.add(weight.to(wide), delta, alpha=scale)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Its change of a parameter: ``scale * left @ right``; None where it has no such change."""
        if name not in self.shapes:
            return None
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = self._tensors(f"{key}.lora_A.weight", f"{key}.lora_B.weight")
        rank = a.shape[0]  # of this tensor: a rank pattern is honoured
        if not rank:  # so mergekit-extract-lora writes a weight in which its models do not differ
            return None
        scale = self._alpha(name) / (rank**0.5 if self.config.get("use_rslora") else rank)
        return (a.T, b.T, scale) if self._transposed else (b, a, scale)

    def _tensors(self, *keys: str) -> list[torch.Tensor]:
        if self._kept:
            return [self._kept[key] for key in keys]
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return [file.get_tensor(key) for key in keys]

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return (self.folder / WEIGHTS).stat().st_size

    def keep(self) -> None:
        """Read everything for the last time; low-rank changes stay as they are stored."""
        if not self._kept:
            self._kept.update(load_file(self.folder / WEIGHTS))

    def _alpha(self, name: str) -> float:
        """Of the first pattern that the end of a tensor's name matches, as peft looks it up."""
        module = name.removesuffix(".weight")
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(alpha)
        return float(self.config["lora_alpha"])

    def sha256(self) -> bytes:
        """Hash over config and weights."""
        digest = hashlib.sha256()
        for file in (CONFIG, WEIGHTS):
            with open(self.folder / file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.digest()


def require_safetensors(path: str, revision: str | None) -> None:
    """Refuse an adapter of any kind whose weights peft would have to unpickle.

    Raises:
        UserError: it cannot be found, or has pickled weights only.
    """
    folder, name = _folder(path, revision), f"adapter '{path}'"
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} has no {CONFIG}; give the folder that peft saved")
    _require_weights(folder / WEIGHTS, name)


def _folder(path: str, revision: str | None) -> Path:
    folder = _found(path, revision)
    refuse_stand_ins(folder, f"adapter '{path}'")
    return folder


def _found(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"adapter folder '{path}' not found")
    try:
        return hub.adapter(path, revision)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"adapter '{path}' cannot be read: {hub.no_model(error)}") from error


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config: Any = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{name}: {CONFIG} cannot be read: it is no JSON object")
    return config


def _check_numbers(config: dict[str, Any], name: str) -> None:
    """Refuse an alpha that is no number, or a pattern of them that is no pattern."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{name}: {CONFIG}: alpha_pattern is no JSON object of numbers")
    alphas = {"lora_alpha": config.get("lora_alpha")}
    alphas |= {f"alpha_pattern['{pattern}']": alpha for pattern, alpha in patterns.items()}
    for key, alpha in alphas.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not isfinite(alpha):
            raise UserError(
                f"{name}: {CONFIG} has {key} = {json.dumps(alpha):.200}; expected a number"
            )
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise UserError(
                f"{name}: {CONFIG}: '{pattern}' in alpha_pattern is no pattern of names: {error}"
            ) from error


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of some, where 0 is not False nor 1 True."""
    return any(type(value) is type(other) and value == other for other in values)


def _shapes(
    file: Path, name: str
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    """Of the low-rank changes, and of what is held whole, as `Adapter` has it."""
    _require_weights(file, name)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    saved: dict[str, tuple[int, ...]] = {}
    try:
        for key, (shape, _) in stored_tensors(file).items():
            match, whole = _KEY.match(key), _WHOLE.match(key)
            if match is not None and len(shape) == 2 and not match[1].endswith(".lora_embedding"):
                found.setdefault(f"{match[1]}.weight", {})[match[2]] = shape
            elif whole is not None:  # whichever it is, peft loads it into the parameter of its name
                saved[whole[1]] = shape
            else:
                raise UserError(
                    f"{name} holds {key} {list(shape)}, which is no plain LoRA matrix of a linear "
                    "layer; merge it into its model and give the folder of the result"
                )
    except SafetensorError as error:
        raise UserError(f"{name}: {WEIGHTS} is damaged: {error}") from error
    for parameter, sides in found.items():
        if set(sides) != {"A", "B"}:
            raise UserError(f"{name} has only lora_{next(iter(sides))} of {parameter}")
    if both := sorted(found.keys() & saved):
        raise UserError(f"{name} changes {both[0]} and holds it whole as well; save it again")
    if not found and not saved:
        raise UserError(f"{name} holds no weights")
    return {parameter: (sides["A"], sides["B"]) for parameter, sides in found.items()}, saved


def _require_weights(file: Path, name: str) -> None:
    if not file.is_file():
        raise UserError(
            f"{name} has no {WEIGHTS}; pickled weights are never loaded, save it again with peft"
        )
