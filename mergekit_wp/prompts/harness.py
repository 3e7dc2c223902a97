"""Tasks of EleutherAI's lm-evaluation-harness (the extra ``[eval]``): found, and their texts."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_wp.errors import UserError
from mergekit_wp.prompts.location import HARNESS, Location


def load_task(spec: str) -> tuple[str, Any]:
    """A task of the harness, by name or from its YAML file, and its name.

    Raises:
        UserError: lm-eval is not installed; no such task (names close ones); a group; its data
            cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"'{spec}' is a task of lm-eval, which is not installed: pip install "
            "'mergekit-wp[eval]' (a file is given with its ending, such as FILE.jsonl)"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(spec)
    is_file = path.suffix in (".yaml", ".yml")
    if is_file and not path.is_file():
        raise UserError(f"task file {spec} not found")
    # a file's own folder is all that is looked at: to list the harness's own tasks takes seconds
    folder = str(path.resolve().parent) if is_file else None
    manager = TaskManager(include_path=folder, include_defaults=not is_file)
    name = _name_in(path) if is_file else spec
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"lm-eval has no task '{name}'{hint}")
    try:
        found = manager.load(name)
    except Exception as error:  # datasets and the Hub raise whatever they like
        reason = " ".join(str(error).split())
        raise UserError(f"lm-eval task '{name}' cannot be loaded: {reason}") from error
    task = found["tasks"].get(name)
    if task is None or found["groups"]:
        raise UserError(f"'{name}' is a group of lm-eval tasks; name its tasks one by one")
    return name, task


def texts(source: Location) -> Iterator[str]:
    """What a task asks of documents that it is not evaluated on.

    Those are its training documents, else its few-shot documents, where neither comes from the
    split of its validation or test documents.

    Raises:
        UserError: see `load_task`; there are no such documents, or they are no single texts; a
            split is named.
    """
    if source.split is not None:
        raise UserError(
            f"{source.place}: 'split' says on which documents a task is evaluated; as prompts "
            "there are its training documents, so leave it out"
        )
    name, task = load_task(source.place.removeprefix(HARNESS))
    config = task.config
    evaluated = {config.test_split, config.validation_split}
    few_shot = task.fewshot_cfg.split
    if task.has_training_docs() and config.training_split not in evaluated:
        documents = task.training_docs()
    elif few_shot not in (None, *evaluated):
        documents = task.fewshot_docs()
    else:
        splits = ", ".join(sorted(map(repr, evaluated - {None})))
        raise UserError(
            f"lm-eval task '{name}' has no training or few-shot documents besides those that it "
            f"is evaluated on ({splits}); prompts have to be others: give a dataset or a file"
        )
    for document in documents:
        text = task.fewshot_context(document, 0)
        if not isinstance(text, str):
            raise UserError(
                f"lm-eval task '{name}' asks by several texts for one document, which are no "
                "prompts; give a dataset or a file"
            )
        yield text


def _name_in(path: Path) -> str:
    import yaml

    # `!function` tags of the harness are not ours to run
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"task file {path} cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise UserError(f"task file {path} has no 'task' name")
    return str(data["task"])
