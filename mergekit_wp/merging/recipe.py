"""A merge recipe: read, with every mistake that shows in the text itself refused.

mergekit ignores keys and parameters that it does not know, so that a typo changes a merge
silently; here a typo is an error. `preflight` then holds the recipe against the models it names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, TypeAlias

import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge import _set_chat_template
from pydantic import BaseModel, ValidationError

from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import complaint, parse_yaml
from mergekit_wp.merging.expert_scores import ExpertScores, load
from mergekit_wp.merging.model_references import placed, yaml_of
from mergekit_wp.merging.parameters import SPEC, refuse_unused
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.model_names import refuse_twice
from mergekit_wp.terms import FUSIONS

SHARED = tuple(p.name for p in SPEC.shared_parameters)
PER_EXPERT = tuple(p.name for p in SPEC.input_parameters)

#: a recipe's file, or what it holds
RecipeLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
#: what errors call a recipe that is in no file
_IN_MEMORY = Path("in memory")


class _Dumper(yaml.SafeDumper):
    """Plain YAML, in which a path is its text."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


@dataclass(frozen=True)
class Recipe:
    """A recipe as its author wrote it, as mergekit reads it, and the score files that it names."""

    path: Path
    source: str
    config: MergeConfiguration
    score_files: tuple[ExpertScores, ...] = ()

    @property
    def is_weight_patching(self) -> bool:
        """Whether the checks of this module apply."""
        return bool(self.config.merge_method == SPEC.name)


@dataclass(frozen=True)
class Experts:
    """The models of a recipe of any method: its base, and the others in order, as written."""

    base: str
    models: tuple[str, ...]
    config: MergeConfiguration

    @classmethod
    def read(cls, given: RecipeLike) -> Experts:
        """Read only what a recipe says of its models; score files need not exist.

        Raises:
            UserError: unreadable, or not a recipe of a base and whole experts.
        """
        path, _, data = _load(given)
        return cls.of(placed(_parsed(path, data), path.absolute().parent), path)

    @classmethod
    def of(cls, config: MergeConfiguration, path: str | os.PathLike[str]) -> Experts:
        """The models of a recipe that was read already.

        Raises:
            UserError: not a recipe of a base and whole experts, or a model stands twice.
        """
        if parts := "slices" if config.slices else "modules" if config.modules else "":
            raise UserError(
                f"recipe {path} has '{parts}'; here whole experts are wanted: list them as 'models'"
            )
        if config.base_model is None or not config.models:
            raise UserError(f"recipe {path}: expected 'base_model' and a list of 'models'")
        _refuse_twice(config, path)
        models = dict.fromkeys(str(m.model) for m in config.models if m.model != config.base_model)
        if not models:
            raise UserError(f"recipe {path} names no expert beside the base model")
        return cls(str(config.base_model), tuple(models), config)


@dataclass(frozen=True)
class Scope:
    """One ``parameters:`` block: where it stands, and the model it belongs to, if any."""

    where: str
    parameters: dict[str, Any]
    model: ModelReference | None = None


def read(given: RecipeLike) -> Recipe:
    """Read a recipe; for weight patching also resolve and read the score files it names.

    Args:
        given: a file, or what such a file holds; then score files are looked for from here.

    Raises:
        UserError: unreadable, not a recipe, with keys or parameters that mergekit would silently
            ignore, or with a score file that is missing, unreadable or not given.
    """
    path, source, data = _load(given)
    config = _parsed(path, data, known_only=True)
    found = placed(config, path.absolute().parent)
    if found != config:  # what is kept of the recipe has to be right from elsewhere
        config, source = found, yaml_of(found)
    if config.merge_method != SPEC.name:
        return Recipe(path, source, config)
    _refuse_unknown_keys(data, MergeConfiguration, f"recipe {path}")
    _refuse_twice(config, path)
    recipe = Recipe(path, source, config, _resolve_score_files(config, path))
    _check_parameters(recipe)
    _refuse_unused(recipe)
    return recipe


def _parsed(path: Path, data: Mapping[str, Any], *, known_only: bool = False) -> MergeConfiguration:
    """As mergekit reads it; with a method and dtypes that it knows where that is asked for."""
    try:
        config = MergeConfiguration.model_validate(data)
        if known_only:
            merge_methods.get(config.merge_method)
            for dtype in (config.dtype, config.out_dtype):
                dtype_from_name(dtype)
            if config.chat_template != "auto":  # mergekit looks at it when all is merged
                _set_chat_template(SimpleNamespace(), config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"recipe {path}: {one_line(error)}") from error
    return config


#: where the recipe is of experts that were merged, or fitted together
_WITHIN = ("merge/recipe.yml", "recipe.yml", "mergekit_config.yml")


def _load(given: RecipeLike) -> tuple[Path, str, dict[str, Any]]:
    """What errors call the recipe, its text, and what that says."""
    if isinstance(given, Mapping):
        path = _IN_MEMORY
        try:
            source = yaml.dump(dict(given), Dumper=_Dumper, sort_keys=False)
        except yaml.YAMLError as error:
            raise UserError(f"recipe {path} cannot be written as YAML: {error}") from error
    else:
        path = Path(given)
        try:
            source = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(f"recipe {path} cannot be read: there is no such file") from error
        except IsADirectoryError as error:
            inner = next((path / x for x in _WITHIN if (path / x).is_file()), None)
            meant = "a recipe is a YAML file" if inner is None else f"give {inner}"
            raise UserError(f"recipe {path} cannot be read: it is a folder; {meant}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {path} cannot be read: {error}") from error
    try:
        data = parse_yaml(source)
    except ValueError as error:
        if "expected a single document" in str(error):
            raise UserError(
                f"recipe {path} holds several documents; mergekit-multi runs such files, here a "
                "recipe is one: write each into a file of its own"
            ) from error
        raise UserError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} is not a mapping with 'merge_method' and 'models'")
    return path, source, data


def with_scores(data: Any, change: Callable[[str], str], inside: bool = False) -> Any:
    """What a recipe holds, with every text under ``scores`` changed, however deep it stands.

    Args:
        data: of the recipe, or a part of it.
        change: a reference to a score file to what takes its place.
        inside: whether the part is one under ``scores``.
    """
    if isinstance(data, dict):
        return {
            key: value
            if inside and key == "filter"
            else with_scores(value, change, inside or key == "scores")
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [with_scores(entry, change, inside) for entry in data]
    return change(data) if inside and isinstance(data, str) else data


def score_texts(data: Any) -> list[str]:
    """Every text under ``scores`` in what a recipe holds."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    with_scores(data, note)
    return found


def find_score_file(reference: str, folder: Path) -> str:
    """Absolute path of a score file that a recipe in ``folder`` names.

    Raises:
        UserError: neither in that folder nor in the current one, nor on the Hub.
    """
    if reference.startswith("hf://"):
        return local_path(reference)
    found = os.path.expanduser(reference)
    beside = os.path.join(folder, found)
    if os.path.isfile(beside):
        found = beside
    elif not os.path.isfile(found):
        raise UserError(
            f"score file {reference} not found, neither in the recipe's folder {folder} nor "
            "in the current one; make one with 'mergekit-wp score BASE EXPERT "
            "--prompts FILE.jsonl --out FILE.safetensors'"
        )
    return os.path.abspath(found)


def experts_in_order(config: MergeConfiguration) -> list[ModelReference]:
    """Every input model but the base, as the recipe lists them (mergekit's own plan has sets)."""
    listed = (scopes[0].model for scopes in _scopes(config))
    return list(dict.fromkeys(m for m in listed if m is not None and m != config.base_model))


def one_line(error: BaseException) -> str:
    """What an exception of pydantic, mergekit or transformers says, on one line."""
    if isinstance(error, ValidationError):
        return complaint(error)
    return " ".join(str(error).split()) or type(error).__name__


_LISTED: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
}


def _refuse_unknown_keys(block: Mapping[str, Any], schema: type[BaseModel], where: str) -> None:
    for key in block:
        if key not in schema.model_fields:
            allowed = ", ".join(schema.model_fields)
            raise UserError(f"{where}: unknown key '{key}'; allowed are {allowed}")
    for key, inner in _LISTED.items():
        for i, entry in enumerate(block.get(key) or []):
            _refuse_unknown_keys(entry, inner, f"{where}: {key}[{i}]")
    for name, module in (block.get("modules") or {}).items():
        _refuse_unknown_keys(module, OutputModuleDefinition, f"{where}: modules.{name}")


def _refuse_twice(config: MergeConfiguration, path: str | os.PathLike[str]) -> None:
    """Refuse models that stand twice where one output is made of them."""
    for holder in (config, *(config.modules or {}).values()):
        for listed in (holder.models, *(output.sources for output in holder.slices or [])):
            try:
                refuse_twice([entry.model for entry in listed or []], config.base_model)
            except UserError as error:
                raise UserError(f"recipe {path}: {error}") from error


def _scopes(config: MergeConfiguration) -> Iterator[tuple[Scope, ...]]:
    """For every input model, the parameter blocks that apply to it, its own first."""

    def of(holder: Any, where: str, model: ModelReference | None = None) -> Scope:
        return Scope(where, holder.parameters or {}, model)

    def inputs(holder: Any, where: str, outer: tuple[Scope, ...]) -> Iterator[tuple[Scope, ...]]:
        for entry in holder.models or []:
            yield (of(entry, f"model {entry.model}", entry.model), *outer)
        for i, output in enumerate(holder.slices or []):
            here = of(output, f"{where}slices[{i}]")
            for entry in output.sources:
                yield (of(entry, f"model {entry.model}", entry.model), here, *outer)

    top = of(config, "the recipe")
    yield from inputs(config, "", (top,))
    for name, module in (config.modules or {}).items():
        yield from inputs(module, f"modules.{name}.", (of(module, f"modules.{name}"), top))


def _check_parameters(recipe: Recipe) -> None:
    config = recipe.config
    if config.base_model is None:
        raise UserError(f"recipe {recipe.path}: weight_patching needs a 'base_model'")
    experts = 0
    for scopes in _scopes(config):
        own, *outer = scopes
        for scope in scopes:
            _check_names(recipe, scope, config.base_model)
        if own.model == config.base_model:
            continue
        experts += 1
        if not any("scores" in scope.parameters for scope in (own, *outer)):
            raise UserError(
                f"recipe {recipe.path}: {own.where} has no 'scores'; give it the score file that "
                "'mergekit-wp score BASE EXPERT --prompts FILE.jsonl --out FILE.safetensors' writes"
            )
    if not experts:
        raise UserError(f"recipe {recipe.path} names no expert beside the base model")


def _refuse_unused(recipe: Recipe) -> None:
    """Refuse a parameter that no fusion of the recipe looks at."""
    every = list(_scopes(recipe.config))
    given = {name for scopes in every for scope in scopes for name in scope.parameters}
    fusions = [
        next((s.parameters["fusion"] for s in scopes if "fusion" in s.parameters), FUSIONS[0])
        for scopes in every
    ]
    if all(fusion in FUSIONS for fusion in fusions):  # else another error says it
        try:
            refuse_unused(given, fusions)
        except UserError as error:
            raise UserError(f"recipe {recipe.path}: {error}") from error


def _check_names(recipe: Recipe, scope: Scope, base: ModelReference) -> None:
    for name in scope.parameters:
        if name not in SHARED + PER_EXPERT:
            raise UserError(
                f"recipe {recipe.path}: {scope.where} has an unknown parameter '{name}'; "
                f"per model: {', '.join(PER_EXPERT)}; shared: {', '.join(SHARED)}"
            )
        if scope.model is not None and name in SHARED:
            raise UserError(
                f"recipe {recipe.path}: '{name}' is shared by all models; move it from "
                f"{scope.where} to the recipe's own 'parameters'"
            )
        if scope.model == base:
            raise UserError(
                f"recipe {recipe.path}: the base {scope.where} takes no parameters, "
                f"but has '{name}'"
            )


def _resolve_score_files(config: MergeConfiguration, path: Path) -> tuple[ExpertScores, ...]:
    """Make every ``scores`` path absolute: beside the recipe first, else from here; read them."""
    folder, files = path.absolute().parent, dict[str, ExpertScores]()

    def resolve(setting: Any) -> Any:
        if isinstance(setting, list):
            return [resolve(entry) for entry in setting]
        if isinstance(setting, ConditionalParameter):
            return ConditionalParameter(value=resolve(setting.value), filter=setting.filter)
        if not isinstance(setting, str):
            raise UserError(f"recipe {path}: 'scores' must be a path, not {setting!r}")
        found = find_score_file(setting, folder)
        files[found] = load(found)
        return found

    for scopes in _scopes(config):
        for scope in scopes:
            if "scores" in scope.parameters:
                scope.parameters["scores"] = resolve(scope.parameters["scores"])
    return tuple(files.values())
