"""The model card of a merge: mergekit's own README, completed for the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.card import text
from mergekit_wp.card.chart import chart
from mergekit_wp.card.contributions import contributions, used_scores
from mergekit_wp.card.evaluation import Evaluation, evaluation, is_ours
from mergekit_wp.card.fitted import fit_section
from mergekit_wp.card.front_matter import with_keys
from mergekit_wp.card.scores import ScoreCopy, copy_scores
from mergekit_wp.card.sources import Source, common_licence, sources
from mergekit_wp.errors import UserError, option
from mergekit_wp.files.atomic import written_whole
from mergekit_wp.merging.interface import differing, taken
from mergekit_wp.merging.plan import plan_only
from mergekit_wp.merging.recipe import Recipe, experts_in_order, read
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.model_names import distinct_names
from mergekit_wp.version import __version__

README, CONFIG, CHART = "README.md", "mergekit_config.yml", "contributions.png"
BEGIN, END = "<!-- mergekit-wp: begin -->", "<!-- mergekit-wp: end -->"
_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)


def write_card(
    folder: Path,
    recipe: Recipe,
    tasks: Sequence[ExecuteMergeMethodTask],
    results: Path | None = None,
    row: str | None = None,
) -> None:
    """Write or complete README.md, and for weight_patching copy the score files.

    What is between the two mergekit-wp marks is replaced, what others wrote stays; so does a
    licence that the README states already.

    Args:
        folder: of the merged model.
        recipe: the merge's.
        tasks: mergekit's plan of it.
        results: folder of a `mergekit-wp compare`, for the evaluation.
        row: which row of it this merge is; None finds the row with the same recipe.

    Raises:
        UserError: a score file or the results cannot be read, or README.md not written.
    """
    # what can be refused comes first, so that a refusal leaves the folder as it was
    measured = evaluation(results, row, recipe.config, _digest) if results is not None else None
    config_text, copies = recipe.source, list[ScoreCopy]()
    if recipe.is_weight_patching:
        copies, config_text = copy_scores(recipe, folder)
    found = sources(recipe.config)
    asked = text.how_it_is_asked(
        TextInterface.read(folder, folder.name),
        taken(recipe.config, text.shown),
        differing(recipe.config, MergeOptions()),
    )
    parts = [text.source_table(found), asked]
    if recipe.is_weight_patching:
        shares = contributions(experts_in_order(recipe.config), tasks)
        with written_whole(folder / CHART) as temporary:
            temporary.write_bytes(chart(shares, distinct_names(shares.experts)))
        parts.append(text.contribution_table(shares, CHART))
        parts.append(text.score_table(copies, used_scores(tasks)))
        if (reached := fit_section(recipe, tasks, copies)) is not None:
            parts.append(reached)
    if measured is not None:
        parts.append(text.evaluation_section(measured))
    parts.append(text.how_to_repeat(CONFIG, __version__, bool(copies)))
    section = "\n".join([BEGIN, *parts, END]) + "\n"

    before = _existing(folder) or mergekit_card(recipe.config, config_text, folder.name)
    card = ModelCard(before)
    body = card.text.replace(recipe.source.strip(), config_text.strip())
    body = _SECTION.sub("", body).rstrip() + "\n\n" + section
    stated = _changed(cast(ModelCardData, card.data), found, measured, folder.name)
    try:
        written = _with_front_matter(before, stated, body)
    except ValueError as error:
        raise UserError(
            f"{folder / README}: its front matter cannot be completed ({error}); write one "
            "`key: value` a line, or remove the file"
        ) from error
    with written_whole(folder / CONFIG) as temporary:
        temporary.write_text(config_text, encoding="utf-8")
    with written_whole(folder / README) as temporary:
        temporary.write_text(written, encoding="utf-8", newline="")


def _changed(
    data: ModelCardData, found: list[Source], measured: Evaluation | None, name: str
) -> dict[str, Any]:
    """What the front matter has to state anew; base models that people added stay."""
    stated = data.get("base_model") or []
    own = [stated] if isinstance(stated, str) else list(stated)
    models = list(dict.fromkeys([*own, *(source.path for source in found if source.on_hub)]))
    changes: dict[str, Any] = {} if models == own != [] else {"base_model": models or None}
    if data.get("base_model_relation") != "merge":
        changes["base_model_relation"] = "merge"
    if data.license is None and (licence := common_licence(found)) is not None:
        changes["license"] = licence
    before = data.eval_results or []
    # without a comparison the table goes, and its numbers with it
    after = [result for result in before if not is_ours(result)]
    if measured is not None:
        data.model_name = data.model_name or name
        after = _replaced(before, measured.results)
    if after != before:
        data.eval_results = after
        written = yaml.safe_load(data.to_yaml())
        changes["model-index"] = written["model-index"] if after else None
    return changes


def _with_front_matter(content: str, changes: dict[str, Any], body: str) -> str:
    """A card with another body, and keys of its front matter changed."""
    block = REGEX_YAML_BLOCK.match(content)
    end = "\r\n" if block and block[1].endswith("\r\n") else "\n"
    head = with_keys(block[2] if block else "", changes).replace("\n", end)
    return f"---{end}{head}{end}---{end}{body}"


def complete_card(folder: Path, results: Path | None, row: str | None) -> bool:
    """Write or complete README.md of a merge by mergekit, whose inputs are still readable.

    Args:
        folder: of the merged model, with its mergekit_config.yml.
        results: as for `write_card`.
        row: as for `write_card`.

    Returns:
        Whether the card names a model that the Hub can link to.

    Raises:
        UserError: there is no recipe, an input cannot be read, or as `write_card`.
    """
    if row is not None and results is None:
        raise UserError(f"{option('row')} names a row of {option('results')}; give both")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} has no {CONFIG}, which mergekit writes beside a merge; give the merged "
            "model's folder"
        )
    ensure_registered()
    recipe = read(folder / CONFIG)
    # also of ".", so that the card has a name
    write_card(folder.resolve(), recipe, plan_only(recipe), results, row)
    return bool(ModelCard.load(folder / README).data.get("base_model"))


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _existing(folder: Path) -> str | None:
    path = folder / README
    if not path.exists():
        return None
    try:
        content = path.read_bytes().decode()
        ModelCard(content)
        return content
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read: {' '.join(str(error).split())[:200]}; mend its front matter "
            "or remove the file"
        ) from error


def _replaced(old: Sequence[EvalResult], new: Sequence[EvalResult]) -> list[EvalResult]:
    """Results of others stay; ours on the same tasks are replaced."""
    kept = [o for o in old if not any(o.is_equal_except_value(n) for n in new)]
    ours = {(n.dataset_type, n.dataset_name, n.dataset_split) for n in new}
    kept = [o for o in kept if (o.dataset_type, o.dataset_name, o.dataset_split) not in ours]
    return [*kept, *new]


def mergekit_card(config: MergeConfiguration, config_text: str, name: str) -> str:
    """Mergekit's README. It asks the Hub about every relative path, so folders go in absolute."""
    shown: dict[str, str] = {}

    def rooted_path(path: ModelPath) -> ModelPath:
        if not os.path.exists(path.path):
            return path
        shown[os.path.abspath(path.path)] = path.path
        return ModelPath.model_construct(path=os.path.abspath(path.path), revision=None)

    def rooted(model: ModelReference) -> ModelReference:
        return ModelReference.model_construct(
            model=rooted_path(model.model), lora=model.lora and rooted_path(model.lora)
        )

    everyone = {model: rooted(model) for model in config.referenced_models()}
    stand_in = SimpleNamespace(
        merge_method=config.merge_method,
        base_model=everyone.get(config.base_model),
        referenced_models=lambda: sorted(everyone.values(), key=str),
    )
    written: str = generate_card(stand_in, config_text, name)
    head, heading, recipe = written.partition("### Configuration")
    for absolute in sorted(shown, key=len, reverse=True):
        head = head.replace(absolute, shown[absolute])
    return head + heading + recipe
