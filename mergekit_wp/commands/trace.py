"""`mergekit-wp trace`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mergekit_wp.commands.options import prompt_file, prompted, rescored, running

_FRACTION = click.FloatRange(0, 1, min_open=True)


@click.command(short_help="Who supplies the components that matter?")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@prompted
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON to write; `plot --trace` draws it. A killed run goes on where it was.",
)
@rescored
@click.option(
    "--targets",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Components whose suppliers are looked for: those with the largest activation_gain.",
)
@click.option(
    "--suppliers",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Suppliers of each target to measure exactly, by weights and by activations; as many "
    "random ones judge the first-order screen.",
)
@click.option(
    "--least",
    type=_FRACTION,
    default=0.05,
    show_default=True,
    help="A component has a role from this part of the circuit's largest effect on.",
)
@click.option(
    "--edge",
    type=_FRACTION,
    default=0.05,
    show_default=True,
    help="A supply counts from this part of its target's effect on.",
)
@click.option(
    "--own",
    type=_FRACTION,
    default=0.5,
    show_default=True,
    help="A carrier's weights alone have at least this part of its effect, a router's less.",
)
@click.option(
    "--shallow",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Carriers lie in this first part of the layers.",
)
@click.option(
    "--direct",
    type=_FRACTION,
    default=0.5,
    show_default=True,
    help="An executor has at least this part of its effect without later components.",
)
@click.option(
    "--min-suppliers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Components that have to supply a router.",
)
@running
@click.option("--restart", is_flag=True, help="Throw away what a killed run left, begin anew.")
def trace(
    prompts: Path | None,
    behavior: str | None,
    least: float,
    edge: float,
    own: float,
    shallow: float,
    direct: float,
    min_suppliers: int,
    **options: Any,
) -> None:
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
    import huggingface_hub
    import transformers

    from mergekit_wp.files.circuitfile import Rules
    from mergekit_wp.mechanism.circuit import trace as run
    from mergekit_wp.mechanism.request import TraceRequest
    from mergekit_wp.models.placement import choose_device
    from mergekit_wp.report.mechanism import circuit_table
    from mergekit_wp.runs.progress import BarProgress

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    options["device"] = choose_device(options["device"])
    rules = Rules(
        least=least, edge=edge, own=own, shallow=shallow, direct=direct, suppliers=min_suppliers
    )
    progress = BarProgress()
    try:
        with prompt_file(prompts, behavior) as path:
            found = run(
                TraceRequest(prompts=path, behavior=behavior, rules=rules, **options), progress
            )
    finally:
        progress.close()
    click.echo(circuit_table(found))
    click.echo(f"\nwritten to {options['out']}")
