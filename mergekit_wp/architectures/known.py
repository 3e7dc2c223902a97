"""Declarations by model type and by class name: this package's own, and those of others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mergekit_wp.architectures.declaration import Architecture
from mergekit_wp.architectures.families import FAMILIES
from mergekit_wp.errors import UserError

_BY_TYPE = {family.model_type: family for family in FAMILIES}
_BY_CLASS = {family.class_name: family for family in FAMILIES}


def register(architecture: Architecture) -> None:
    """Declare a decoder that this package does not know, as long as the process lives.

    Register its classes with transformers' ``AutoConfig`` and ``AutoModelForCausalLM`` too.

    Args:
        architecture: the declaration; the same one may be given again.

    Raises:
        UserError: another one stands under its ``model_type`` or ``class_name``, or it has no
            ``layers``.
    """
    if not architecture.mapped:
        raise UserError(f"architecture '{architecture.model_type}' declares no path of its layers")
    for name, known in (
        (architecture.model_type, _BY_TYPE.get(architecture.model_type)),
        (architecture.class_name, _BY_CLASS.get(architecture.class_name)),
    ):
        if known is not None and _content(known) != _content(architecture):
            raise UserError(
                f"architecture '{name}' is declared already, and otherwise; give yours a "
                "model_type and a class_name of its own"
            )
    _BY_TYPE[architecture.model_type] = _BY_CLASS[architecture.class_name] = architecture


def _content(architecture: Architecture) -> list[Any]:
    """All that is declared, functions by their code: a notebook's cell may run twice."""
    values = [getattr(architecture, part.name) for part in fields(architecture)]
    return [getattr(value, "__code__", value) for value in values]


def of_type(model_type: str) -> Architecture | None:
    """The declaration for a config's ``model_type``, None where there is none."""
    return _BY_TYPE.get(model_type)


def text_config(config: Any) -> Any:
    """The config of the text model that is scored: of a larger model the part, else itself."""
    architecture = of_type(config.model_type)
    return config.text_config if architecture and architecture.text_type else config


def named(class_name: str) -> Architecture:
    """The declaration for a model class, as files name it.

    Raises:
        UserError: there is none.
    """
    if class_name not in _BY_CLASS:
        raise UserError(
            f"architecture '{class_name:.80}' is not declared here: import the package that "
            "declares it, which calls mergekit_wp.architectures.register "
            "(docs/new-architecture.md)"
        )
    return _BY_CLASS[class_name]
