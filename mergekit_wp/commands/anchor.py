"""`mergekit-wp anchor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import progress, prompt_file
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.mechanism.request import AnchorRequest
from mergekit_wp.options import PrintRequest


@click.command(
    cls=OnceEach, short_help="Does this behaviour have a usable anchor, and at which layer?"
)
@options_of(AnchorRequest, PrintRequest, DryRunRequest, optional=("prompts",))
def anchor(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Look for a direction that stands for a behaviour, layer by layer; prompts need contrasts.

    The direction is the mean difference of EXPERT's residual stream at the last prompt token, with
    and without the instruction. For every layer: how well it separates held-out prompts (effect
    size), how stable it is between halves of the prompts (cosine), and how far the base gets
    towards the expert's answers when the vector is added there, at that token (recovery of `kl`).
    A layer is usable where the effect size is at least 1, the cosine at least 0.5, and the
    steering's 95% interval above zero; `score --anchor-layer N` takes it.

    \b
      mergekit-wp anchor base/ expert/ --builtin capitals
    """
    from mergekit_wp import api
    from mergekit_wp.mechanism.anchors import best_anchor
    from mergekit_wp.report.mechanism import anchor_table

    with progress(dry_run) as bar, prompt_file(options) as path:
        fields = given(AnchorRequest, options | {"prompts": path})
        found = api.find_anchors(**fields, progress=bar)
    chosen = best_anchor(found)
    if as_json:
        layers = [asdict(layer) | {"usable": layer.usable} for layer in found]
        click.echo(json.dumps({"usable_layer": chosen and chosen.layer, "layers": layers}))
        return
    click.echo(anchor_table(found))
    click.echo(
        "\nno layer has a usable anchor for this behaviour: localise it by kl instead"
        if chosen is None
        else f"\nusable; the layer that separates best is {chosen.layer}: "
        f"score with --criterion anchor --anchor-layer {chosen.layer}"
    )
