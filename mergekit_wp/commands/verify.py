"""`mergekit-wp verify`."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mergekit_wp.commands.options import prompt_file, prompted, rescored, running
from mergekit_wp.terms import ESTIMANDS


@click.command(short_help="What do the leading components do together?")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--top",
    required=True,
    metavar="K[,K...]",
    help="Sizes of the sets: counts of components, or parts such as 1%,5%,20%.",
)
@prompted
@click.option(
    "--task",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Items for `compare` (JSONL): how many test answers are right is measured, too. With "
    "--behavior its own items are taken, checked by the IFEval rule.",
)
@click.option(
    "--checkers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Python file with checkers of your own for --task.",
)
@rescored
@click.option(
    "--estimand", type=click.Choice(ESTIMANDS), help="Scores to rank by.  [default: first]"
)
@click.option(
    "--draws",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Random sets of every size.",
)
@running
@click.option("--restart", is_flag=True, help="Throw away what a killed run left, begin anew.")
def verify(
    top: str,
    prompts: Path | None,
    behavior: str | None,
    task: Path | None,
    checkers: Path | None,
    **options: Any,
) -> None:
    """Swap the leading components of the score FILE together, and see what that does.

    Restoration is the base with the top K components of the expert: how much of the behaviour comes
    back (1 is all of it). Knockout is the expert with its top K set back to the base: how much is
    lost. Beside them stand the bottom K, and random sets with as many components of every kind.
    The curve is printed and written into FILE's manifest, for `inspect` and `plot`. `kl` is the
    divergence of the output from the expert's, scaled to 0 at the base and 1 at the expert. Use
    prompts that were not scored on.

    \b
      mergekit-wp verify expert.safetensors --top 1%,5%,20% --prompts held-out.jsonl
      mergekit-wp verify expert.safetensors --top 1%,5%,20% --behavior capitals
    """
    import huggingface_hub
    import transformers

    from mergekit_wp.errors import UserError
    from mergekit_wp.mechanism.request import VerifyRequest
    from mergekit_wp.mechanism.verify import verify as run
    from mergekit_wp.models.placement import choose_device
    from mergekit_wp.report.verification import table
    from mergekit_wp.runs.progress import BarProgress
    from mergekit_wp.tasks import behaviors
    from mergekit_wp.tasks.checkers import Checkers
    from mergekit_wp.tasks.items import JsonlTask

    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    options["device"] = choose_device(options["device"])
    if checkers is not None and task is None:
        raise UserError("--checkers goes with --task")
    sizes = tuple(part.strip() for part in top.split(",") if part.strip())
    progress = BarProgress()
    with prompt_file(prompts, behavior) as path, ExitStack() as stack:
        stack.callback(progress.close)
        request = VerifyRequest(
            top=sizes, prompts=path, behavior=behavior, task=task, checkers=checkers, **options
        )
        if behavior is not None and task is None:
            task = path.with_suffix(".items.jsonl")  # beside its prompts, and gone with them
            task.write_text(behaviors.jsonl(behaviors.behavior(behavior).items()))
        items = None
        if task is not None:
            items = JsonlTask.read(
                task,
                Checkers.load(checkers),
                max_new_tokens=options["max_new_tokens"],
                batch_size=options["batch_size"],
            )
        found = run(request, items, progress)
    click.echo(table(found))
    click.echo(f"\nwritten into {options['file']}")
