"""`mergekit-wp card`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.card.request import CardRequest
from mergekit_wp.commands.derive import OnceEach, options_of


@click.command(cls=OnceEach, short_help="Complete a merge's model card for the Hub.")
@options_of(CardRequest)
def card(merged: Path, results: Path | None, row: str | None) -> None:
    """Write what a Hub visitor needs into the README.md of the merge in MERGED.

    MERGED is what `mergekit-wp merge` or `mergekit-yaml` wrote, with its mergekit_config.yml; the
    models and score files named there must still be readable. The card gets the inputs with their
    revisions and licences, `base_model_relation: merge`, how many components each expert
    contributed, and the score files with their hashes, which are copied to MERGED/scores. Run it
    again whenever you like: only the part between the mergekit-wp marks is replaced.

    \b
      mergekit-wp compare recipe.yml --task inst.jsonl --out comparison/
      mergekit-wp merge recipe.yml merged/
      mergekit-wp card merged/ --results comparison/
    """
    import transformers

    from mergekit_wp.card.write import README, complete_card

    transformers.logging.set_verbosity_error()
    on_hub = complete_card(merged, results, row)
    click.echo(f"model card written to {merged.resolve() / README}")
    if not on_hub:
        click.echo("before you upload: add the Hub ids of your inputs to its 'base_model'")
