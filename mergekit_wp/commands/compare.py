"""`mergekit-wp compare`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergekit_wp.compare.plan import Plan
    from mergekit_wp.compare.resampling import Resampled
    from mergekit_wp.compare.run import Runner


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
    from tqdm import tqdm

    from mergekit_wp.autoload import ensure_registered
    from mergekit_wp.compare.request import KEPT, CompareRequest, fingerprint, make_plan
    from mergekit_wp.compare.resampling import Resampled
    from mergekit_wp.compare.results import Results
    from mergekit_wp.compare.run import Runner
    from mergekit_wp.compare.table import terminal_table
    from mergekit_wp.models.placement import choose_device

    transformers.logging.set_verbosity_error()
    ensure_registered()
    options["device"] = choose_device(options["device"])
    if options["methods"] is not None:
        names = (name.strip() for name in options["methods"].split(","))
        options["methods"] = tuple(dict.fromkeys(name for name in names if name))
    request = CompareRequest(**options)
    plan, notes = make_plan(request)
    for note in notes:
        click.echo(f"mergekit-wp: {note}", err=True)
    with (
        Results(request.out, fingerprint(plan), request.restart) as results,
        tqdm(desc="comparing", unit="job", total=1, mininterval=0.5) as bar,
    ):

        def said(name: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(name, refresh=False)
            bar.refresh()

        def told(note: str) -> None:
            bar.write(f"mergekit-wp: {note}", file=sys.stderr)

        if request.restart:
            shutil.rmtree(request.out / KEPT, ignore_errors=True)
        runner = Runner(plan, results, said, told)
        comparison = runner.run()
    resampled = Resampled(comparison)
    click.echo(terminal_table(resampled))
    _write(request.out, plan, runner, resampled)
    click.echo(f"\nreport: {request.out / 'report.html'}")
    if failed := [row.name for row in comparison.rows if row.failed]:
        click.echo(
            f"mergekit-wp: failed: {', '.join(failed)}; the same command tries them again", err=True
        )
        context.exit(1)


def _write(out: Path, plan: Plan, runner: Runner, resampled: Resampled) -> None:
    from mergekit_wp.compare.page import html_page
    from mergekit_wp.compare.rows import recipe_name
    from mergekit_wp.compare.table import markdown_table, summary
    from mergekit_wp.files.atomic import written_whole

    title = f"{len(plan.experts)} experts merged: {', '.join(plan.names)}"
    texts = {
        "summary.json": json.dumps(summary(resampled), indent=1),
        "table.md": markdown_table(resampled),
        "report.html": html_page(resampled, title),
    }
    for name, config in runner.chosen.items():
        texts[f"recipes/{recipe_name(name)}.yml"] = config.to_yaml()
    for path, text in texts.items():
        with written_whole(out / path) as temporary:
            temporary.write_text(text, encoding="utf-8")
