"""`mergekit-wp trace`."""

from __future__ import annotations

from typing import Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import progress, prompt_file
from mergekit_wp.costs.request import DryRunRequest
from mergekit_wp.mechanism.request import TraceRequest


@click.command(cls=OnceEach, short_help="Who supplies the components that matter?")
@options_of(TraceRequest, DryRunRequest, optional=("prompts",), required=("out",))
def trace(dry_run: bool, **options: Any) -> None:
    """Trace which components supply those that matter, for a score FILE with activation_gain.

    Targets are the heads and neurons with the largest effect when they write what they write in the
    expert's run. A supplier's change goes into the target's input and nowhere else: how much of the
    behaviour comes back along this one edge? By weights: the supplier has the expert's weights and
    the base's input, so the change starts there. By activations: it passes on what reached it.

    Roles: a carrier holds the change in its weights, is shallow and supplies others; a router has
    its effect from its suppliers; an executor acts on the output itself.

    \b
      mergekit-wp score BASE EXPERT --estimand gain,activation_gain --prompts p.jsonl \\
          --out s.safetensors
      mergekit-wp trace s.safetensors --prompts p.jsonl --out trace.json
      mergekit-wp plot s.safetensors --trace trace.json --out page.html
    """
    from mergekit_wp import api
    from mergekit_wp.report.mechanism import circuit_table

    with progress(dry_run) as bar, prompt_file(options) as path:
        found = api.trace(**given(TraceRequest, options | {"prompts": path}), progress=bar)
    click.echo(circuit_table(found))
    click.echo(f"\nwritten to {options['out']}")
