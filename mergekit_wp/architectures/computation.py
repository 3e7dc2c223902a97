"""Whether two configs make one computation of the same weights: what transformers builds of them.

Not their text: one rope may be spelt in several ways, and one length may change every logit.
`RopeBorders` are the lengths at which it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mergekit_wp.architectures import of_type, text_config

#: where the architectures name their activation
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
#: config entries that say how a checkpoint was saved, not what it computes
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
#: what is built of one config and of the other, and differs: its name and both values
Mismatch = tuple[str, Any, Any]

# config entries that are read while a model runs, in any of the architectures
_READ = (
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
# config entries that say how a checkpoint was saved or trained or what tokens mean, and those that
# are compared by what is built of them
_ELSEWHERE = (
    *VOLATILE_CONFIG,
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "architectures",
    "initializer_range",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "layer_types",
    *ACTIVATIONS,
)
# rope parameters of which a table of frequencies and a factor are all that is made
_TABULATED = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    }
)
# what modules keep beside what they compute with
_BOOKKEEPING = (
    "dropout",
    "gradient_checkpointing",
    "init_std",
    "initializer_range",
    "jitter",
    "layer_idx",
    "loss",
    "max_position",
    "max_seq_len",
    "name_or_path",
    "padding_idx",
    "rope_type",
    "training",
    "use_cache",
    "vocab_size",
)
_ACTIVATION_TYPES = tuple(
    entry[0] if isinstance(entry, tuple) else entry
    for entry in ACT2CLS.values()
    if isinstance(entry, type | tuple)
)
# numbers of one setting, written out in text or worked out
_CLOSE = 1e-6


@dataclass(frozen=True)
class RopeBorders:
    """Lengths beyond which a forward pass turns all of its tokens by other frequencies.

    Attributes:
        steps: with one other set of frequencies beyond (longrope).
        growing: with frequencies of each length's own beyond (dynamic rope).
    """

    steps: frozenset[int] = frozenset()
    growing: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Any) -> RopeBorders:
        """Of a model's config."""
        config = text_config(config)
        steps, growing = set(), set()
        for _, rope in rope_by_layer_type(config):
            kind = str(rope.get("rope_type"))
            if kind == "longrope":
                steps.add(int(rope["original_max_position_embeddings"]))
            elif "dynamic" in kind:
                growing.add(int(config.max_position_embeddings))
        return cls(frozenset(steps), frozenset(growing))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.steps or self.growing)

    def side(self, length: int) -> tuple[int, ...]:
        """Alike for lengths that are turned alike."""
        steps = sum(length > border for border in self.steps)
        return (steps, *(max(length, border) for border in sorted(self.growing)))


def difference(
    base: Any, expert: Any, base_model: PreTrainedModel, expert_model: PreTrainedModel
) -> Mismatch | None:
    """The first thing in which two models of one architecture and of equal shapes differ.

    Args:
        base: a config.
        expert: another.
        base_model: what transformers builds of the first, without weights.
        expert_model: of the second.
    """
    mapped = of_type(base.model_type) is not None
    elsewhere = {*_ELSEWHERE, *(base.attribute_map.get(key) for key in _ELSEWHERE)}
    both = {**base.to_dict(), **expert.to_dict()}
    read = _READ if mapped else [k for k in both if k not in elsewhere and "dropout" not in k]
    ours, theirs = text_config(base), text_config(expert)
    if _rotary(ours, theirs, base_model, expert_model):
        return _first(ours, theirs, "rope_parameters", "max_position_embeddings")
    if _windows(ours) != _windows(theirs):
        return _first(ours, theirs, "sliding_window", "layer_types")
    for key in read:
        one, other = (getattr(config, key, None) or None for config in (ours, theirs))
        if one != other:
            return key, one, other
    return _built(base_model, expert_model, (ours, theirs))


def _first(ours: Any, theirs: Any, *keys: str) -> Mismatch:
    """The first entry that differs, of some before all others, to be named for what it makes."""
    differ = (
        (key, getattr(ours, key, None), getattr(theirs, key, None))
        for key in (*keys, *ours.to_dict())
        if getattr(ours, key, None) != getattr(theirs, key, None)
    )
    return next(differ)


def _windows(config: Any) -> list[int | str | None]:
    """How many tokens each layer sees, None for all; of other kinds of layers what they are."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [window] * int(config.num_hidden_layers)
    plain = {"sliding_attention": window, "full_attention": None}
    return [plain.get(kind, kind) for kind in kinds]


def _rotary(ours: Any, theirs: Any, one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models turn queries and keys differently, at any length."""
    others = dict(other.named_modules())
    for path, module in one.named_modules():
        same = others.get(path)
        for name, table in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq"):
                continue
            if not _alike(table, getattr(same, name, None)):
                return True
            factor = name.replace("inv_freq", "attention_scaling")
            if not _alike(getattr(module, factor, None), getattr(same, factor, None)):
                return True
    parameters = [dict(rope_by_layer_type(config)) for config in (ours, theirs)]
    for kind in {**parameters[0], **parameters[1]}:
        first, second = (found.get(kind, {}) for found in parameters)
        if {*first, *second} - _TABULATED and first != second:
            return True
        borders = sorted(_borders(ours, first) | _borders(theirs, second))
        for length in (length + more for length in borders for more in (0, 1)):
            tables = _table(ours, first, kind, length), _table(theirs, second, kind, length)
            if not all(_alike(*pair) for pair in zip(*tables, strict=True)):
                return True
    return False


def rope_by_layer_type(config: Any) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Rope parameters of each kind of layer; of None where all layers have the same."""
    stated = getattr(config, "rope_parameters", None) or {}
    if stated and all(isinstance(value, dict) for value in stated.values()):
        yield from stated.items()
    else:
        yield None, stated


def _borders(config: Any, parameters: dict[str, Any]) -> set[int]:
    """Lengths at which frequencies may change; beyond twice the largest nothing new comes."""
    stated = (
        getattr(config, "max_position_embeddings", None),
        parameters.get("original_max_position_embeddings"),
    )
    found = {int(length) for length in stated if isinstance(length, int | float)}
    return found | {2 * max(found)} if found else found


def _table(
    config: Any, parameters: dict[str, Any], kind: str | None, length: int
) -> tuple[torch.Tensor | None, float | None]:
    """Frequencies and factor at a length, of ropes that change with it; others are built."""
    rope = parameters.get("rope_type")
    if rope not in ("dynamic", "longrope"):
        return None, None
    table, factor = ROPE_INIT_FUNCTIONS[rope](
        config, torch.device("cpu"), seq_len=length, layer_type=kind
    )
    return table, factor


def _built(
    one: PreTrainedModel, other: PreTrainedModel, configs: tuple[Any, Any]
) -> Mismatch | None:
    """The first module that is another one, or keeps another number."""
    positions = {getattr(config, "max_position_embeddings", None) for config in configs}
    others = dict(other.named_modules())
    for path, module in one.named_modules():
        same = others.get(path)
        if isinstance(module, torch.nn.Dropout):
            continue
        if isinstance(module, _ACTIVATION_TYPES) and isinstance(same, _ACTIVATION_TYPES):
            if not _same_function(module, same):
                return _first(*configs, *ACTIVATIONS)
            continue
        if same is None or type(module) is not type(same):
            return path, type(module).__name__, type(same).__name__
        ours, theirs = dict(_settings(module)), dict(_settings(same))
        for name in {**ours, **theirs}:
            if not _alike(ours.get(name), theirs.get(name), positions):
                one_value, other_value = ours.get(name), theirs.get(name)
                key = _stated(configs, one_value, other_value) or f"{path}.{name}".lstrip(".")
                return key, one_value, other_value
    return None


def _stated(configs: tuple[Any, Any], ours: Any, theirs: Any) -> str | None:
    """The config entry that has these two values, if it is the only one."""
    if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
        return None
    one, other = (config.to_dict() for config in configs)
    found = [key for key in one if (one[key], other.get(key)) == (ours, theirs)]
    return found[0] if len(found) == 1 else None


def _settings(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Plain values and buffers of one module."""
    kept = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    for name, value in {**kept, **dict(module.named_buffers(recurse=False))}.items():
        if not name.startswith("_") and not any(part in name for part in _BOOKKEEPING):
            yield name, value


def _same_function(one: Any, other: Any) -> bool:
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    return torch.allclose(one(grid), other(grid), rtol=_CLOSE, atol=_CLOSE)


def _alike(one: Any, other: Any, positions: Set[int | None] = frozenset()) -> bool:
    """Whether two values are one; of tables with a row a position, as far as both go."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dim() != other.dim():
            return False
        shared = []
        for extents in zip(one.shape, other.shape, strict=True):
            if extents[0] != extents[1] and not set(extents) <= positions:
                return False
            shared.append(slice(min(extents)))
        one, other = one[tuple(shared)], other[tuple(shared)]
        if not one.is_floating_point():
            return torch.equal(one, other)
        return torch.allclose(one, other, rtol=_CLOSE, atol=0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return type(one) is type(other) and bool(one == other)
