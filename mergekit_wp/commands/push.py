"""`mergekit-wp push`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.card.request import PushRequest
from mergekit_wp.commands.derive import OnceEach, options_of


@click.command(cls=OnceEach, short_help="Upload a merge to the Hub.")
@options_of(PushRequest)
def push(merged: Path, repository: str, public: bool) -> None:
    """Upload the merge in MERGED to the Hub, as REPOSITORY (owner/name).

    The model card is checked first: it has to name the models that were merged by their Hub ids,
    and a licence. A new repository is private; one that is there keeps what it is. Log in with
    `hf auth login`, or set HF_TOKEN.

    \b
      mergekit-wp push merged/ owner/name
    """
    from mergekit_wp.card.push import push as run

    click.echo(f"uploaded to {run(merged, repository, public=public)}")
