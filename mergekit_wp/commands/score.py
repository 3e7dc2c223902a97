"""`mergekit-wp score`."""

from __future__ import annotations

import shlex
from typing import Any

import click

from mergekit_wp.commands.derive import given, options_of
from mergekit_wp.commands.shown import merge_by, progress
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.options import declared
from mergekit_wp.runs.progress import BarProgress
from mergekit_wp.scoring.request import ScoreRequest

#: why not with --company, where the reason is not that it says what to measure of one expert
_REASONS = {
    "share_steps": "it goes along the path; give --path-steps",
}
_ALONE = (
    "experts scored together are scored in every kind of component, by kl, along the guided path"
)


@click.command(short_help="Measure what each component of an expert does.")
@options_of(
    ScoreRequest,
    CompanyRequest,
    DryRunRequest,
    optional=("base", "expert", "recipe"),
    required=("out",),
    several=("expert",),
)
@click.pass_context
def score(context: click.Context, /, dry_run: bool, **options: Any) -> None:
    """Measure how much of EXPERT's behaviour each component of its weights carries.

    BASE and EXPERT are folders or Hub ids (owner/name@revision) of one architecture; EXPERT may be
    MODEL+ADAPTER, with a LoRA adapter that is never merged on disk. Components are attention heads,
    K/V groups, MLP neurons, whole tensors and layers. The score file is small, names the
    checkpoints it belongs to, and is what a `weight_patching` recipe reads.

    \b
      mergekit-wp score base/ expert/ --prompts prompts.jsonl --out expert.safetensors

    Start the same command again after a crash: it continues. Cost is counted in forward passes
    over all prompts; the heads of a model are swapped one by one for about half as many passes as
    it has heads, all neurons are estimated by a dozen.

    To merge several experts, score them in each other's company: what restores a behaviour in the
    base is not what survives beside another expert. All experts then move from the base at once,
    step by step, each component only while it raises the sum of all behaviours; how far it came is
    its `path` score. One file per expert is written, and a recipe that merges by them:

    \b
      mergekit-wp score base/ inst/ math/ --prompts inst=inst.jsonl \\
          --prompts math=math.jsonl --out scores/
      mergekit-wp merge scores/recipe.yml merged/
    """
    together = options["recipe"] is not None or len(options["expert"]) > 1
    _check_together(context, together)
    with progress(dry_run) as bar:
        said = (_together if together else _alone)(options, bar)
    click.echo(said)


def _check_together(context: click.Context, together: bool) -> None:
    """Refuse what was given and is not asked of one expert, or of all together."""
    from mergekit_wp.errors import UserError

    taken = {*declared(CompanyRequest if together else ScoreRequest), *declared(DryRunRequest)}
    for parameter in context.command.params:
        name = str(parameter.name)
        what = parameter.opts[0] if isinstance(parameter, click.Option) else name.upper()
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        listed = name in ("base", "expert") and context.params["recipe"] is None
        if given and name not in taken and not listed:
            if not together:
                raise UserError(f"{what} goes with several experts, or with --company RECIPE")
            whole = "several experts" if context.params["recipe"] is None else "--company"
            raise UserError(f"{what} does not go with {whole}: {_REASONS.get(name, _ALONE)}")
        if not together and name in ("base", "expert") and not context.params[name]:
            recipe = str(context.params["base"]).endswith((".yml", ".yaml"))
            meant = " A recipe's experts are scored with --company RECIPE." if recipe else ""
            raise click.UsageError(f"Missing argument '{what}'.{meant}", context)


def _alone(options: dict[str, Any], bar: BarProgress) -> str:
    from mergekit_wp import api
    from mergekit_wp.errors import UserError

    if len(options["prompts"]) > 1:
        raise UserError("--prompts is given more than once; that is for several experts")
    one = {"prompts": options["prompts"][0], "expert": options["expert"][0]}
    api.score(**given(ScoreRequest, options | one), progress=bar)
    look = shlex.join(["mergekit-wp", "inspect", str(options["out"])])
    return f"{options['out']} written; look at it with: {look}"


def _together(options: dict[str, Any], bar: BarProgress) -> str:
    from mergekit_wp import api
    from mergekit_wp.errors import UserError

    if options["out"].is_file():
        raise UserError(
            f"--out {options['out']} is a file; experts scored together go into a folder"
        )
    if options["recipe"] is None:
        options = options | {"recipe": (options["base"], *options["expert"])}
    found = api.score_together(**given(CompanyRequest, options), progress=bar)
    return merge_by(options["out"], found)
