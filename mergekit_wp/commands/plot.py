"""``mergekit-wp plot``: a score file as one picture or one page."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_wp.commands.derive import OnceEach, options_of
from mergekit_wp.report.request import PlotRequest


@click.command(cls=OnceEach, short_help="Draw a score file as a picture or a page.")
@options_of(PlotRequest)
def plot(file: str, out: Path, trace: Path | None) -> None:
    """Draw score FILE: layers, tensors, heads, K/V groups and neurons.

    A .png is one figure with a row for each estimand and criterion. A .html is one page that
    needs nothing else, not even a network: three sentences, one picture, and folded away the
    recipe, all figures, the leading components, weights against activations where both are
    scored, the traced circuit, what sets of components do together, how stable the ranking is,
    and how far to trust the scores.

    Red is a positive score (the component carries the behaviour), blue a negative one (it works
    against it), white zero; layer 0 is at the bottom. All panels have one scale of colours, by
    the square root of the score; gates of a fit have their own, from 0 to their bound. The
    neurons' panel shows how many neurons of each layer have which score: most are near zero,
    leaders stand far out on the right.

    \b
    Examples:
      mergekit-wp plot caps.safetensors --out caps.png
      mergekit-wp plot caps.safetensors --out caps.html
      mergekit-wp plot caps.safetensors --trace trace.json --out caps.html
    """
    from mergekit_wp.report.page import plot as run

    run(file, out, trace)
