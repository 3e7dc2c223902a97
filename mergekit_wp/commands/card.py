"""`mergekit-wp card`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Complete a merge's model card for the Hub.")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of `mergekit-wp compare`: its table goes into the card, and this merge's own "
    "results into the front matter, where the Hub reads them.",
)
@click.option(
    "--row",
    metavar="NAME",
    help="Which row of --results this merge is.  [default: the row with the same recipe]",
)
def card(out: Path, results: Path | None, row: str | None) -> None:
    """Write what a Hub visitor needs into the README.md of the merge in OUT.

    OUT is what `mergekit-wp merge` or `mergekit-yaml` wrote, with its mergekit_config.yml; the
    models and score files named there must still be readable. The card gets the inputs with their
    revisions and licences, `base_model_relation: merge`, how many components each expert
    contributed, and the score files with their hashes, which are copied to OUT/scores. Run it
    again whenever you like: only the part between the mergekit-wp marks is replaced.

    \b
      mergekit-wp compare recipe.yml --task inst.jsonl --out comparison/
      mergekit-wp merge recipe.yml merged/
      mergekit-wp card merged/ --results comparison/
    """
    import transformers

    from mergekit_wp.card.write import README, complete_card

    transformers.logging.set_verbosity_error()
    on_hub = complete_card(out, results, row)
    click.echo(f"model card written to {out.resolve() / README}")
    if not on_hub:
        click.echo("before you upload: add the Hub ids of your inputs to its 'base_model'")
