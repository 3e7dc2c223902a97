"""`mergekit-wp score`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mergekit_wp.joint.request import PATH_STEPS
from mergekit_wp.runs.progress import Progress
from mergekit_wp.scoring.request import SHARE_STEPS
from mergekit_wp.terms import CRITERIA, KINDS, LONE_ESTIMANDS


class _NameList(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice of names."""

    def __init__(self, what: str, allowed: tuple[str, ...]) -> None:
        self.name, self.allowed = what, allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [part.strip() for part in value.split(",") if part.strip()]
        for name in names:
            if name not in self.allowed:
                self.fail(f"unknown {self.name} '{name}'; choose from {', '.join(self.allowed)}")
        if not names:
            self.fail(f"no {self.name} given; choose from {', '.join(self.allowed)}")
        return tuple(name for name in self.allowed if name in names)


class _OrAuto(click.ParamType[int | None]):
    """A whole number, or 'auto' (None)."""

    def __init__(self, minimum: int) -> None:
        self.name, self.minimum = "auto|N", minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or value == "auto":
            return None
        if isinstance(value, str) and (not value.isdecimal() or int(value) < self.minimum):
            self.fail(f"'{value}' is neither 'auto' nor a whole number from {self.minimum}")
        return int(value)


@click.command(short_help="Measure what each component of an expert does.")
@click.argument("base", required=False)
@click.argument("expert", required=False)
@click.option(
    "--prompts",
    required=True,
    multiple=True,
    metavar="FILE | EXPERT=FILE",
    help="JSONL: 'prompt' (text or chat messages), optional 'contrast' (the same request without "
    "the instruction), optional 'response' (else the expert's own greedy answer). With --company "
    "once per expert, as EXPERT=FILE, where EXPERT is its folder's or repository's last name.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Score file to write; appears only when complete. A killed run keeps its finished blocks "
    "in FILE.partial and goes on from there. With --company a folder.",
)
@click.option(
    "--company",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Instead of BASE and EXPERT: score all experts of a recipe together, for merging them "
    "with `fusion: path`.",
)
@click.option("--behavior", help="Name of what the prompts elicit.  [default: the prompt file's]")
@click.option(
    "--estimand",
    "estimands",
    type=_NameList("estimand", LONE_ESTIMANDS),
    default="share,gain",
    show_default=True,
    help="share: integrated gradients from base to expert, sums to 1, what a merge wants. "
    "gain: what the component brings to the base. knockout: what the expert loses without it. "
    "activation_gain, activation_knockout: the same for what it writes in the other's run, to tell "
    "sources from what only passes a signal on.",
)
@click.option(
    "--criterion",
    "criteria",
    type=_NameList("criterion", CRITERIA),
    help="kl: the expert's next-token distribution. anchor: a direction in the residual stream. "
    "logprob: likelihood of the response.  [default: kl, and anchor too when two or more contrasts "
    "are given]",
)
@click.option(
    "--kinds",
    type=_NameList("kind", KINDS),
    default=",".join(KINDS),
    show_default=True,
    help="Kinds of component to score.",
)
@click.option(
    "--anchor-layer",
    type=_OrAuto(0),
    default="auto",
    show_default=True,
    help="Layer the anchor is read after; auto takes the one that separates best on held-out "
    "prompts.",
)
@click.option(
    "--verify",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    metavar="K",
    help="Where a kind is scored to first order, swap the top K and K random ones exactly and "
    "write how well they agree.",
)
@click.option("--max-prompts", type=click.IntRange(min=1), metavar="N", help="Use the first N.")
@click.option(
    "--batch-size",
    type=_OrAuto(1),
    default="auto",
    show_default=True,
    help="Sequences per forward pass (patches times prompts); auto goes by free memory. Halved "
    "when memory runs out.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights and activations; criteria are always computed in float32 or finer.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--device-map",
    type=click.Choice(["auto"]),
    help="For models larger than the device: spread the weights over it, other GPUs, main memory "
    "and, where they do not fit there either, leave them in the checkpoints. All computing is on "
    "--device, where weights come for the moment that they are used.",
)
@click.option(
    "--max-memory",
    multiple=True,
    metavar="DEVICE=SIZE",
    help="With --device-map, most memory for weights on a GPU, by its number, or on cpu, as in "
    "0=20GiB; once per device, others are not used.  [default: half of what is free on --device, "
    "nine tenths on the others]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Draws the random sample, and the probes of second-order scores.",
)
@click.option(
    "--share-steps",
    type=click.IntRange(min=1),
    help=f"Midpoints of the share integral; with --company, steps of the guided path.  [default: "
    f"{SHARE_STEPS}; with --company {PATH_STEPS}]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Length of the expert's own answers, where the file gives no response.",
)
@click.option(
    "--ray",
    is_flag=True,
    help="Compute on a Ray cluster: that of RAY_ADDRESS, a running one of this machine, or a new "
    "one. pip install 'mergekit-wp[ray]'",
)
@click.option("--restart", is_flag=True, help="Throw away what a killed run left, begin anew.")
@click.pass_context
def score(context: click.Context, /, **options: Any) -> None:
    """Measure how much of EXPERT's behaviour each component of its weights carries.

    BASE and EXPERT are folders or Hub ids (owner/name@revision) of one architecture; EXPERT may be
    MODEL+ADAPTER, with a LoRA adapter that is never merged on disk. Components are attention heads,
    K/V groups, MLP neurons, whole tensors and layers. The score file is small, names the
    checkpoints it belongs to, and is what a `weight_patching` recipe reads.

    \b
      mergekit-wp score base/ expert/ --prompts prompts.jsonl --out expert.safetensors

    Start the same command again after a crash: it continues. Cost is counted in forward passes
    over all prompts; the heads of a model are swapped one by one for about half as many passes as
    it has heads, all neurons to first order for a handful.

    To merge several experts, score them in each other's company: what restores a behaviour in the
    base is not what survives beside another expert. All experts then move from the base at once,
    step by step, each component only while it raises the sum of all behaviours; how far it came is
    its `path` score. One file per expert is written, and a recipe that merges by them:

    \b
      mergekit-wp score --company recipe.yml --prompts inst=inst.jsonl \\
          --prompts math=math.jsonl --out scores/
      mergekit-wp merge scores/recipe.yml merged/
    """
    import huggingface_hub
    import transformers
    from pydantic import ValidationError

    from mergekit_wp.errors import UserError
    from mergekit_wp.models.placement import choose_device
    from mergekit_wp.runs.progress import BarProgress

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its retries are not our one line
    options["device"] = choose_device(options["device"])
    run = _alone if options["company"] is None else _together
    progress = BarProgress()
    try:
        said = run(context, options, progress)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}") from error
    finally:
        progress.close()
    click.echo(said)


def _alone(context: click.Context, options: dict[str, Any], progress: Progress) -> str:
    from mergekit_wp.errors import UserError
    from mergekit_wp.scoring.request import ScoreRequest
    from mergekit_wp.scoring.score import score as run

    del options["company"]
    for name in ("base", "expert"):
        if options[name] is None:
            raise click.UsageError(f"Missing argument '{name.upper()}'.", context)
    if len(options["prompts"]) > 1:
        raise UserError("--prompts is given more than once; that is for --company RECIPE")
    options["prompts"] = Path(options["prompts"][0])
    options["share_steps"] = options["share_steps"] or SHARE_STEPS
    options["max_memory"] = _max_memory(options)
    request = ScoreRequest(**options)
    run(request, progress)
    return f"{request.out} written; look at it with: mergekit-wp inspect {request.out}"


def _max_memory(options: dict[str, Any]) -> dict[str, int] | None:
    from mergekit_wp.errors import UserError
    from mergekit_wp.models.placement import check_places, parse_max_memory

    device_map, given, device = options.pop("device_map"), options["max_memory"], options["device"]
    if device_map is None:
        if given:
            raise UserError("--max-memory says where weights go with --device-map auto: add that")
        return None
    check_places(device)
    return parse_max_memory(given, device)


#: options that say what to measure of one expert
_ALONE = ("base", "expert", "behavior", "estimands", "criteria", "kinds", "anchor_layer", "verify")


def _together(context: click.Context, options: dict[str, Any], progress: Progress) -> str:
    from mergekit_wp.errors import UserError
    from mergekit_wp.joint.company import score_company
    from mergekit_wp.joint.files import RECIPE
    from mergekit_wp.joint.request import CompanyRequest

    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if name in _ALONE and given:
            what = parameter.opts[0] if isinstance(parameter, click.Option) else name.upper()
            raise UserError(
                f"{what} does not go with --company, which takes base and experts from the recipe "
                "and scores every kind of component by kl along the guided path"
            )
    if options.pop("ray"):
        raise UserError("--ray does not go with --company: the steps of the path need each other")
    if options.pop("device_map") or options["max_memory"]:
        raise UserError("--device-map does not go with --company, which holds its model whole")
    del options["max_memory"]
    pairs = []
    for given_prompts in options["prompts"]:
        expert, equals, file = given_prompts.partition("=")
        if not equals:
            raise UserError(f"--prompts {given_prompts}: with --company, write EXPERT=FILE.jsonl")
        pairs.append((expert, Path(file)))
    if options["out"].is_file():
        raise UserError(f"--out {options['out']} is a file; --company writes into a folder")
    kept = {k: v for k, v in options.items() if k not in _ALONE}
    recipe, steps = kept.pop("company"), kept.pop("share_steps") or PATH_STEPS
    kept["prompts"] = tuple(pairs)
    out = kept["out"]
    found = score_company(CompanyRequest(**kept, recipe=recipe, steps=steps), progress)
    return (
        f"{', '.join(str(out / f'{name}.safetensors') for name in found)} written; merge by them "
        f"with: mergekit-wp merge {out / RECIPE} OUT"
    )
