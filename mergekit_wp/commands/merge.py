"""``mergekit-wp merge``: a recipe in, a checkpoint out, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import transformers
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_wp import api
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.commands.derive import given, options_of
from mergekit_wp.commands.shown import progress, show_plan
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.errors import UserError
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging.merge import check_target, look
from mergekit_wp.merging.request import MergeRequest

if TYPE_CHECKING:
    from mergekit_wp.costs.work import Costs


@click.command("merge", cls=PrettyPrintHelp, short_help="Merge experts, or as a recipe says.")
@options_of(
    MergeRequest,
    FitRequest,
    DryRunRequest,
    exclude=("recipe", "batch_size", "device"),
    optional=("prompts",),
)
@add_merge_options  # type: ignore[untyped-decorator]
@click.pass_context
def merge(
    context: click.Context,
    /,
    merge_options: MergeOptions,
    what: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Merge experts into their base, or as a RECIPE says, into the folder OUT.

    \b
      mergekit-wp merge BASE EXPERT EXPERT --prompts EXPERT=FILE --prompts EXPERT=FILE --out OUT
      mergekit-wp merge RECIPE OUT

    The first is the whole job: the experts are fitted together on their prompts, as `fit` does
    with the same options, merged, and described in a model card. OUT/merge keeps the score files
    and the recipe, so that every step can be taken again by itself; the same command again goes on
    where it stopped. A recipe of the same models may stand in the place of BASE and EXPERTs.

    RECIPE is a mergekit recipe; every merge method and every option of `mergekit-yaml` works.
    For `merge_method: weight_patching` the recipe, its score files and a few tensors of every
    expert are checked before anything is merged. Relative paths of score files and models are
    looked up in the recipe's folder first, then in the current one;
    `hf://owner/repo[@revision]/FILE` is a file on the Hugging Face Hub. OUT appears only when the
    merge is complete, with a model card for the Hub, the recipe and its score files;
    `mergekit-wp card` adds evaluation results to it, `mergekit-wp push` uploads it.

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
    if options["prompts"]:
        folder = _fitted(merge_options, what, out, overwrite, dry_run, options)
    else:
        recipe, folder = _by_recipe(context, what, out)
        if dry_run:
            ensure_registered()
            show_plan(look(recipe, folder, merge_options, overwrite=overwrite))
        with progress() as bar:
            api.merge(recipe, folder, merge_options, overwrite=overwrite, progress=bar)
    click.echo(f"merged model written to {folder}")


def _fitted(
    merge_options: MergeOptions,
    what: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    options: dict[str, Any],
) -> Path:
    if out is None:
        raise UserError("--prompts goes with --out OUT, the folder for the merged model; add it")
    check_target(out, what)  # known before anything is fitted
    device = str(merge_options.device or "auto")
    fields = given(FitRequest, options | {"recipe": what, "device": device})
    with progress(dry_run, then=_merge_after) as bar:
        api.merge_experts(
            **fields, out=out, options=merge_options, overwrite=overwrite, progress=bar
        )
    return out


def _merge_after(opened: Any) -> Costs | None:
    """The merge that follows the fit, whose recipe there is not yet; nothing after the merge."""
    from mergekit_wp.costs.merging import after_fit
    from mergekit_wp.costs.model_size import PairSize
    from mergekit_wp.joint.fit import FitOpened

    if not isinstance(opened, FitOpened):
        return None
    return after_fit([PairSize.of(run.pair) for run in opened.runs])


def _by_recipe(
    context: click.Context, what: tuple[str, ...], out: Path | None
) -> tuple[Path, Path]:
    """The recipe and the folder; what is said of a fit is refused."""
    for parameter in context.command.params:
        name = str(parameter.name)
        of_fit = name in FitRequest.model_fields and name not in MergeRequest.model_fields
        source = context.get_parameter_source(name)
        if of_fit and source == click.core.ParameterSource.COMMANDLINE:
            raise UserError(
                f"{parameter.opts[0]} goes with experts that are fitted: give --prompts "
                "EXPERT=FILE for each"
            )
    places = [*map(Path, what), *([out] if out is not None else [])]
    if len(places) != 2:
        scores = any(place.suffix == ".safetensors" for place in places)
        meant = "; score files are merged by the recipe that was written beside them"
        raise UserError(
            "expected RECIPE OUT; or BASE EXPERT ... with --prompts EXPERT=FILE for each expert "
            f"and --out OUT{meant if scores else ''}"
        )
    return places[0], places[1]
