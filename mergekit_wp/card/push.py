"""A merged model on the Hub: its card checked, then all files uploaded."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import HfApi, ModelCard

from mergekit_wp.card.write import README
from mergekit_wp.errors import UserError
from mergekit_wp.files.atomic import is_model
from mergekit_wp.models import hub

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: what an unfinished run keeps
_UNFINISHED = ("*.partial/*", ".*")


def push(folder: Path, repository: str, *, public: bool = False, api: HfApi | None = None) -> str:
    """Upload a merged model, to a private repository where it is a new one.

    Args:
        folder: of the model.
        repository: ``owner/name``.
        public: make a new repository public.
        api: of the Hub; that of the logged-in user where None.

    Returns:
        Where it is.

    Raises:
        UserError: the folder holds no model, its card does not say what the Hub needs, or the
            upload fails.
    """
    if not _HUB_ID.fullmatch(repository):
        raise UserError(f"'{repository}' is no name of a repository; write owner/name")
    if not is_model(folder):
        raise UserError(f"{folder} holds no model; give the folder that `mergekit-wp merge` wrote")
    _check_card(folder / README)
    api = api or huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a merge by mergekit-wp",
            ignore_patterns=list(_UNFINISHED),
        )
    except hub.CLIENT_ERRORS as error:
        raise UserError(f"{repository} cannot be written: {hub.reason(error)}") from error
    return f"https://huggingface.co/{repository}"


def _check_card(readme: Path) -> None:
    """Refuse a card whose metadata would link the merge to nothing."""
    mend = f"mend the front matter of {readme}"
    if not readme.is_file():
        raise UserError(
            f"there is no {readme}; write it with `mergekit-wp card {readme.parent}` first"
        )
    try:
        data = ModelCard.load(readme).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{readme}: {' '.join(str(error).split())[:200]}; {mend}") from error
    stated = data.get("base_model") or []
    models = [stated] if isinstance(stated, str) else list(stated)
    if not models:
        raise UserError(
            f"{readme} has no 'base_model'; {mend}: add the Hub ids of the models that were merged"
        )
    for model in models:
        if not _HUB_ID.fullmatch(str(model)):
            raise UserError(f"{readme}: base_model '{model}' is no Hub id (owner/name); {mend}")
    if data.get("base_model_relation") != "merge":
        raise UserError(
            f"{readme} does not say 'base_model_relation: merge'; run `mergekit-wp card` on its "
            "folder"
        )
    if not data.get("license"):
        raise UserError(
            f"{readme} has no 'license'; {mend}: add one that the inputs' licences allow"
        )
