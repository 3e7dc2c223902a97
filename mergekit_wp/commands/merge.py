"""``mergekit-wp merge``: a recipe in, a checkpoint out, or one line that says what is wrong."""

from __future__ import annotations

import click
import transformers
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_wp.api import merge as merge_by
from mergekit_wp.commands.derive import options_of
from mergekit_wp.merging.request import MergeRequest


@click.command("merge", cls=PrettyPrintHelp, short_help="Merge experts as a recipe says.")
@options_of(MergeRequest)
@add_merge_options  # type: ignore[untyped-decorator]
def merge(merge_options: MergeOptions, recipe: str, out: str) -> None:
    """Merge the models of RECIPE into the folder OUT.

    RECIPE is a mergekit recipe; every merge method and every option of `mergekit-yaml` works.
    For `merge_method: weight_patching` the recipe, its score files and a few tensors of every
    expert are checked before anything is merged. A relative `scores` path is looked up in the
    recipe's folder first, then in the current one; `hf://owner/repo[@revision]/FILE` is a file on
    the Hugging Face Hub. OUT appears only when the merge is complete, with a model card for the
    Hub, the recipe and its score files; `mergekit-wp card` adds evaluation results to it.

    \b
    merge_method: weight_patching
    base_model: owner/base
    models:
      - model: owner/inst
        parameters: {scores: scores/inst.safetensors, weight: 1.0}
      - model: owner/math
        parameters: {scores: scores/math.safetensors, weight: 1.0}
    parameters: {fusion: share, power: 0.5, lambda: 1.0}
    dtype: bfloat16
    """
    transformers.logging.set_verbosity_error()  # mergekit's own use of deprecated names
    merge_by(recipe, out, merge_options)
    click.echo(f"merged model written to {out}")
