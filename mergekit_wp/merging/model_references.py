"""The models that a recipe names: put in other places, and written so that any name is read back.

mergekit fails to write a recipe in which a model's path has a space: its serializer hands such a
reference back unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, model_serializer

from mergekit_wp.models.refusals import with_named_base


class _AsText(ModelReference):  # type: ignore[misc]
    """A reference that is written as it is read, whatever is in its name."""

    @model_serializer()
    def _text(self) -> str | dict[str, Any]:
        if self.override_architecture is None:
            return str(self)
        parts = {"model": str(self.model), "lora": self.lora and str(self.lora)}
        return parts | {"override_architecture": self.override_architecture}


def replaced(
    config: MergeConfiguration, change: Callable[[ModelReference], ModelReference]
) -> MergeConfiguration:
    """A copy of a recipe with other models, wherever they stand."""
    found: MergeConfiguration = _replaced(config, change)
    return found


def _replaced(value: Any, change: Callable[[ModelReference], ModelReference]) -> Any:
    if isinstance(value, ModelReference):
        return change(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        parts = {name: _replaced(getattr(value, name), change) for name in fields}
        return value.model_copy(update=parts, deep=True)
    if isinstance(value, list):
        return [_replaced(part, change) for part in value]
    if isinstance(value, dict):
        return {key: _replaced(part, change) for key, part in value.items()}
    return value


def data_of(config: MergeConfiguration, **options: Any) -> dict[str, Any]:
    """What a recipe holds, as JSON and YAML have it.

    Args:
        config: the recipe.
        options: of pydantic's ``model_dump``.
    """
    texts = replaced(config, lambda m: _AsText.model_construct(**dict(m)))
    found: dict[str, Any] = texts.model_dump(mode="json", serialize_as_any=True, **options)
    return found


def yaml_of(config: MergeConfiguration) -> str:
    """A recipe's text."""
    return yaml.safe_dump(data_of(config, exclude_defaults=True), sort_keys=False)


def placed(config: MergeConfiguration, folder: Path) -> MergeConfiguration:
    """A recipe whose models are found: beside it first, as score files are, else from here.

    A folder with nothing but an adapter is the model that the adapter was trained on, with it.

    Args:
        config: the recipe.
        folder: it stands in.

    Raises:
        UserError: an adapter does not say what it was trained on, or that is not there.
    """

    def beside(path: ModelPath) -> ModelPath:
        if not path.path or not os.path.isdir(found := folder / Path(path.path).expanduser()):
            return path
        if os.path.isdir(path.path) and os.path.samefile(path.path, found):
            return path
        return ModelPath.model_construct(path=os.path.abspath(found), revision=None)

    def change(model: ModelReference) -> ModelReference:
        path, lora = beside(model.model), model.lora and beside(model.lora)
        if lora is None and os.path.isdir(path.path):
            whole = with_named_base(path.path)
            if whole != path.path:
                named, _, _ = whole.rpartition(f"+{path.path}")
                path, lora = ModelPath.model_validate(named), path
        return model.model_copy(update={"model": path, "lora": lora})

    return replaced(config, change)
