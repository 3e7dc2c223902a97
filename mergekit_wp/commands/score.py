"""`mergekit-wp score`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mergekit_wp.components import KINDS
from mergekit_wp.scorefile import CRITERIA, ESTIMANDS


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
@click.argument("base")
@click.argument("expert")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSONL: 'prompt' (text or chat messages), optional 'contrast' (the same request without "
    "the instruction), optional 'response' (else the expert's own greedy answer).",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Score file to write; appears only when complete. A killed run keeps its finished blocks "
    "in FILE.partial and goes on from there.",
)
@click.option("--behavior", help="Name of what the prompts elicit.  [default: the prompt file's]")
@click.option(
    "--estimand",
    "estimands",
    type=_NameList("estimand", ESTIMANDS),
    default="share,gain",
    show_default=True,
    help="share: integrated gradients from base to expert, sums to 1, what a merge wants. "
    "gain: what the component brings to the base. knockout: what the expert loses without it.",
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
    help="Sequences per forward pass (patches times prompts).",
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
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Draws the random sample, and the probes of second-order scores.",
)
@click.option(
    "--share-steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Midpoints of the share integral.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Length of the expert's own answers, where the file gives no response.",
)
@click.option("--restart", is_flag=True, help="Throw away what a killed run left, begin anew.")
def score(**options: Any) -> None:
    """Measure how much of EXPERT's behaviour each component of its weights carries.

    BASE and EXPERT are folders or Hub ids (owner/name@revision) of one architecture. Components
    are attention heads, K/V groups, MLP neurons, whole tensors and layers. The score file is
    small, names the checkpoints it belongs to, and is what a `weight_patching` recipe reads.

    \b
      mergekit-wp score base/ expert/ --prompts prompts.jsonl --out expert.safetensors

    Start the same command again after a crash: it continues. Cost is counted in forward passes
    over all prompts; the heads of a model are swapped one by one for about half as many passes as
    it has heads, all neurons to first order for a handful.
    """
    import huggingface_hub
    import torch
    import transformers
    from pydantic import ValidationError

    from mergekit_wp.devices import check_device
    from mergekit_wp.errors import UserError
    from mergekit_wp.progress import BarProgress
    from mergekit_wp.scoring.request import ScoreRequest
    from mergekit_wp.scoring.score import score as run

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)  # its retries are not our one line
    if options["device"] == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(options["device"])
    try:
        request = ScoreRequest(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}") from error
    progress = BarProgress()
    try:
        run(request, progress)
    finally:
        progress.close()
    click.echo(f"{request.out} written; look at it with: mergekit-wp inspect {request.out}")
