"""`mergekit-wp compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(short_help="Is it better than TIES, DARE and the rest, for your experts?")
@click.argument("recipes", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="What to measure on; once per task. FILE.jsonl or NAME=FILE.jsonl: lines of 'prompt', "
    "'answer', 'split' (valid or test), 'checker' (exact, contains, number, regex, ifeval). "
    "Anything else is an lm-eval task, by name or YAML file (pip install 'mergekit-wp[eval]').",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for results.")
@click.option("--base", help="Instead of RECIPE: the base model.")
@click.option(
    "--expert",
    "experts",
    multiple=True,
    nargs=2,
    metavar="EXPERT SCORES",
    help="Instead of RECIPE: an expert and its score file; once per expert.",
)
@click.option(
    "--methods",
    metavar="A,B,...",
    help="Methods to compare.  [default: weight_patching, task_arithmetic, ties, dare_ties, "
    "dare_linear, della, breadcrumbs, sce, ram, linear; with --calibration also "
    "task_arithmetic+aim, ties+aim]",
)
@click.option(
    "--grid",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML that replaces grids: `ties: {density: [0.2, 0.5], lambda: [0.7, 1.0]}`.",
)
@click.option(
    "--untuned",
    is_flag=True,
    help="Merge by every method's usual parameters only; needs no validation items.",
)
@click.option(
    "--relative", is_flag=True, help="Count each task relative to the expert that is best at it."
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Merges by methods that draw (DARE, DELLA), each with another seed.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompt file whose texts AIM measures the base's activations on.",
)
@click.option(
    "--checkers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Python file with checkers of your own: f(item, output) -> bool or score.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), help="Answers at once.  [default: auto]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--eval-dtype", help="dtype while evaluating.  [default: the recipe's; float32 on a CPU]"
)
@click.option(
    "--merge-in",
    type=click.Choice(["auto", "memory", "disk"]),
    default="auto",
    show_default=True,
    help="Where merges go; auto: in memory up to 2 GB of float32 weights, else into a folder in "
    "--out that is removed after evaluation. AIM's are always made in memory.",
)
@click.option("--keep", is_flag=True, help="Keep the reported merges in OUT/merged.")
@click.option("--restart", is_flag=True, help="Throw away the results and kept merges in --out.")
@click.pass_context
def compare(context: click.Context, /, **options: Any) -> None:
    """Compare weight patching with other merge methods on your own experts and tasks.

    The first RECIPE is the `weight_patching` recipe in question; further recipes of the same
    models, by any method, become rows of their own. Every method is tuned over a small written
    grid on the validation items and reported on the test items; differences are paired, with 95%
    intervals. Merging is mergekit's own.

    \b
      mergekit-wp compare recipe.yml --task inst.jsonl --task math.jsonl --out comparison/

    OUT gets results.jsonl (one line per item), summary.json, table.md, report.html and recipes/
    with the chosen parameters. Start the same command again after a crash: finished work is kept.
    """
    import transformers

    from mergekit_wp.commands.flags import flags
    from mergekit_wp.compare.compare import compare as run
    from mergekit_wp.compare.progress import ComparisonBar
    from mergekit_wp.compare.request import CompareRequest

    transformers.logging.set_verbosity_error()
    if options["methods"] is not None:
        names = (name.strip() for name in options["methods"].split(","))
        options["methods"] = tuple(dict.fromkeys(name for name in names if name))
    with ComparisonBar(flags(context.command)) as progress:
        found = run(CompareRequest(**options), progress)
    click.echo(found.table())
    click.echo(f"\nreport: {options['out'] / 'report.html'}")
    if found.failed:
        click.echo(
            f"mergekit-wp: failed: {', '.join(found.failed)}; the same command tries them again",
            err=True,
        )
        context.exit(1)
