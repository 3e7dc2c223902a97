"""How a merge is asked: the tokenizer, chat template and end tokens that mergekit gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _copy_tokenizer, _model_out_config, _set_chat_template
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer

from mergekit_wp.errors import UserError
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.open_models import MISTAKES, snapshot, with_snapshots
from mergekit_wp.models.generation import TextInterface

#: what a recipe says beside models and method, and a recipe made from it says too
SETTINGS = ("tokenizer_source", "tokenizer", "chat_template", "dtype", "out_dtype")
#: a chat template in a recipe that is longer than a name is not shown
_NAME = 40


def settings_of(config: MergeConfiguration) -> dict[str, Any]:
    """The `SETTINGS` that a recipe states, as YAML has them."""
    return data_of(config, include=set(SETTINGS), exclude_none=True)


def write_beside(config: MergeConfiguration, options: MergeOptions, folder: Path) -> None:
    """Write what mergekit writes beside the weights of a merge that has the base's shapes.

    That is config, tokenizer and generation config; no tokenizer where mergekit fails to copy one,
    which it takes for no failure of the merge.

    Args:
        config: the recipe.
        options: mergekit's.
        folder: where to.
    """
    placed = with_snapshots(config, options)
    _model_out_config(placed, get_architecture_info(placed, options)).save_pretrained(folder)
    stated = placed.tokenizer
    source = placed.tokenizer_source if stated is None else stated.source
    if source is not None:
        built = BuildTokenizer(
            base_model=placed.base_model,
            referenced_models=tuple(placed.referenced_models()),
            tokenizer_source=source,
            add_tokens=tuple(stated.tokens or () if stated else ()),
        ).execute()
        _set_chat_template(built.tokenizer, placed)
        built.tokenizer.save_pretrained(folder)
        return
    try:
        _copy_tokenizer(placed, str(folder), options)
    except MISTAKES:
        for file in folder.glob("*token*"):
            file.unlink()


def interface_of(model: ModelReference, options: MergeOptions) -> TextInterface | None:
    """How a model of a recipe is asked; one with an adapter as mergekit has it, as its model.

    Raises:
        UserError: it cannot be read.
    """
    place = snapshot(ModelReference(model=model.model), options)
    return TextInterface.read(place.model.path, str(model))


def differing(config: MergeConfiguration, options: MergeOptions) -> dict[str, list[str]]:
    """The models that are asked otherwise than the base, and what differs.

    A tokenizer that cannot be loaded is said to be so: mergekit needs the experts' for no merge
    that copies the base's.
    """
    if config.base_model is None:
        return {}
    start, found = _tried(config.base_model, options), dict[str, list[str]]()
    for model in sorted(config.referenced_models(), key=str):
        if model != config.base_model:
            found[str(model)] = differences(_tried(model, options), start)
    return {model: differs for model, differs in found.items() if differs}


def _tried(model: ModelReference, options: MergeOptions) -> TextInterface | UserError | None:
    try:
        return interface_of(model, options)
    except UserError as error:
        return error


def differences(
    own: TextInterface | UserError | None, base: TextInterface | UserError | None
) -> list[str]:
    """What of an expert's differs from the base's; nothing where it has none of its own."""
    if own is None:
        return []
    if isinstance(own, UserError) or isinstance(base, UserError):
        return ["a tokenizer that cannot be loaded"]
    return ["the base has no tokenizer"] if base is None else own.differences(base)


def taken(config: MergeConfiguration, shown: Callable[[str], str] = str) -> str:
    """Whose tokenizer, chat template and end tokens mergekit gives a merge, in words.

    It copies the base's generation config only where it copies the base's tokenizer as well.
    """
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    template = config.chat_template
    if source == "union":
        whose = "the union of all tokenizers"
    elif isinstance(source, ModelReference):
        whose = f"'{shown(str(source))}'"
    else:
        whose = f"the base '{shown(str(config.base_model))}'" if config.base_model else "a model"
    if template:
        name = f"'{template}'" if len(template) <= _NAME else "of its own"
        return f"the tokenizer of {whose} and the recipe's chat template {name}"
    if source is not None:
        return f"the tokenizer and chat template of {whose}"
    return f"the tokenizer, chat template and end tokens of {whose}"


def difference_note(config: MergeConfiguration, options: MergeOptions) -> str | None:
    """One line where a merge is not asked as an expert is, None where all are asked alike."""
    return note_of(str(config.base_model), differing(config, options), config)


def note_of(
    base: str, differs: Mapping[str, Sequence[str]], config: MergeConfiguration | None
) -> str | None:
    """That line, of the experts that differ; ``config`` None for a recipe that says nothing."""
    if not differs:
        return None
    listed = "; ".join(f"'{model}' ({', '.join(what)})" for model, what in differs.items())
    asked = "the base's" if config is None else taken(config)
    line = f"not asked as the base '{base}': {listed}; a merge by mergekit has {asked}"
    if config is None or not settings_of(config).keys() - {"dtype", "out_dtype"}:
        line += "; `tokenizer: {source: MODEL}` in the recipe takes another's"
    return line
