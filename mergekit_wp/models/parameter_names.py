"""Under which names a checkpoint stores a model's parameters, and how it is read by these.

A file on disk may have other names than the model in memory: an older prefix, none, or one tensor
for each expert of a mixture that transformers stacks. Names come from mergekit's architecture
definitions and transformers' conversions, which mergekit reads checkpoints with as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from mergekit.architecture import arch_info_for_config
from mergekit.architecture.conversion import (
    can_convert_checkpoint_keys,
    convert_checkpoint_tensors,
)

from mergekit_wp.architectures import of_type
from mergekit_wp.models.refusals import FLOATS

_NUMBER = re.compile(r"\.([0-9]+)\.")

Header = tuple[tuple[int, ...], str]
_DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in FLOATS.items()}


class StoredNames:
    """The parameters of a model, found among the tensors of a checkpoint.

    Args:
        config: the checkpoint's.
        headers: shape and stored dtype (as safetensors writes it) of every stored tensor.
    """

    def __init__(self, config: Any, headers: Mapping[str, Header]) -> None:
        self.model_type = str(config.model_type)
        self.config, self.headers = config, headers
        architecture = of_type(self.model_type)
        self._prefix = architecture.stored_prefix if architecture else ""
        self._found: dict[str, Header | None] = {}

    @cached_property
    def _aliases(self) -> dict[str, list[str]]:
        """Other names that mergekit knows, by name."""
        info = arch_info_for_config(self.config) if self.config.architectures else None
        known = {} if info is None else {w.name: w for w in info.all_weights(self.config)}
        aliases = {name: list(weight.aliases or ()) for name, weight in known.items()}
        architecture = of_type(self.model_type)
        for name, other in (architecture.stored_as if architecture else {}).items():
            aliases.setdefault(name, []).append(other)
        return aliases

    @cached_property
    def _by_layer(self) -> dict[str | None, list[str]]:
        """Stored names by the number of their layer: conversions stay within one."""
        found: dict[str | None, list[str]] = {}
        for name in self.headers:
            found.setdefault(_layer(name), []).append(name)
        return found

    def name(self, parameter: str) -> str | None:
        """The one stored tensor that is this parameter, None where there is none."""
        names: list[str] = [parameter, *self._aliases.get(parameter, ())]
        if self._prefix:
            names.append(self._prefix + parameter)
        return next((name for name in names if name in self.headers), None)

    def header(self, parameter: str) -> Header | None:
        """Shape and stored dtype of a parameter, None where the checkpoint has none."""
        if parameter not in self._found:
            self._found[parameter] = self._header(parameter)
        return self._found[parameter]

    def _header(self, parameter: str) -> Header | None:
        if (name := self.name(parameter)) is not None:
            return self.headers[name]
        if not self._is_made(parameter):
            return None
        sources = self._by_layer.get(_layer(parameter), [])
        kinds = {self.headers[source][1] for source in sources}
        unknown = sorted(kinds - set(_DTYPES))
        if unknown:
            return (), unknown[0]
        dtypes = {dtype: kind for kind, dtype in _DTYPES.items()}
        made = self._converted(
            parameter,
            lambda source: torch.empty(
                self.headers[source][0], dtype=_DTYPES[self.headers[source][1]], device="meta"
            ),
        )
        return tuple(made.shape), dtypes[made.dtype]

    def has(self, parameter: str) -> bool:
        """Whether the checkpoint has a parameter, as one tensor or as several."""
        return self.name(parameter) is not None or self._is_made(parameter)

    def _is_made(self, parameter: str) -> bool:
        sources = self._by_layer.get(_layer(parameter), [])
        made: bool = can_convert_checkpoint_keys(self.model_type, set(sources), parameter)
        return made

    def read(self, parameter: str, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A parameter, made of stored tensors.

        Args:
            parameter: one that the checkpoint `has`.
            get: reads a stored tensor.
        """
        name = self.name(parameter)
        return get(name) if name is not None else self._converted(parameter, get)

    def _converted(self, parameter: str, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        def later(name: str) -> Callable[[], torch.Tensor]:
            return lambda: get(name)

        sources = {name: later(name) for name in self._by_layer.get(_layer(parameter), [])}
        made: torch.Tensor | None = convert_checkpoint_tensors(self.model_type, sources, parameter)
        assert made is not None, parameter
        return made


def _layer(name: str) -> str | None:
    match = _NUMBER.search(name)
    return match[1] if match else None
