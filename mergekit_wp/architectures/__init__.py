"""Architectures with a component map, one declaration each (docs/new-architecture.md)."""

from __future__ import annotations

from typing import Any

from mergekit_wp.architectures.declaration import Architecture, without_map
from mergekit_wp.architectures.families import FAMILIES, LLAMA

__all__ = ["FAMILIES", "LLAMA", "Architecture", "named", "of_type", "text_config", "without_map"]

_BY_TYPE = {family.model_type: family for family in FAMILIES}
_BY_CLASS = {family.class_name: family for family in FAMILIES}


def of_type(model_type: str) -> Architecture | None:
    """The declaration for a config's ``model_type``, None where there is none."""
    return _BY_TYPE.get(model_type)


def text_config(config: Any) -> Any:
    """The config of the text model that is scored: of a larger model the part, else itself."""
    architecture = of_type(config.model_type)
    return config.text_config if architecture and architecture.text_type else config


def named(class_name: str) -> Architecture:
    """The declaration for a model class; one without any cut where there is none."""
    return _BY_CLASS.get(class_name) or without_map(class_name)
