"""What a model card is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_wp.errors import option
from mergekit_wp.options import Argument, Option, Request


class CardRequest(Request):
    """Everything `mergekit-wp card` is asked for."""

    merged: Annotated[Path, Argument(path="folder", exists=True)] = Field(
        description="Folder of a merge, with its mergekit_config.yml."
    )
    results: Annotated[Path | None, Option(path="folder", exists=True)] = Field(
        default=None,
        description="Folder of `mergekit-wp compare`: its table goes into the card, and this "
        "merge's own results into the front matter, where the Hub reads them.",
    )
    row: Annotated[str | None, Option(metavar="NAME", default="the row with the same recipe")] = (
        Field(default=None, description=f"Which row of {option('results')} this merge is.")
    )


class PushRequest(Request):
    """Everything `mergekit-wp push` is asked for."""

    merged: Annotated[Path, Argument(path="folder", exists=True)] = Field(
        description="Folder of a merge, with its model card."
    )
    repository: Annotated[str, Argument()] = Field(description="Where to, as owner/name.")
    public: bool = Field(
        default=False, description="Make a new repository public. Without it, it is private."
    )
