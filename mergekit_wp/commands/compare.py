"""`mergekit-wp compare`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_wp.commands.derive import OnceEach, given, options_of
from mergekit_wp.commands.shown import progress
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.comparison.suites.prepare import WHOLE, SuiteRequest, outlook, prepare
from mergekit_wp.costs.request import DryRunRequest

if TYPE_CHECKING:
    from mergekit_wp.costs.work import Costs


@click.command(
    cls=OnceEach, short_help="Is it better than TIES, DARE and the rest, for your experts?"
)
@options_of(
    SuiteRequest,
    CompareRequest,
    DryRunRequest,
    optional=("recipes", "tasks"),
    required=("out",),
)
@click.pass_context
def compare(context: click.Context, /, dry_run: bool, **options: Any) -> None:
    """Compare weight patching with other merge methods on your own experts and tasks.

    The first RECIPE is the `weight_patching` recipe in question; further recipes of the same
    models, by any method, become rows of their own. Every method is tuned over a small written
    grid on the validation items and reported on the test items; differences are paired, with 95%
    intervals. Merging is mergekit's own.

    \b
      mergekit-wp compare recipe.yml --task inst.jsonl --task math.jsonl --out comparison/
      mergekit-wp compare recipe.yml --task inst.jsonl --task math.jsonl --out first/ --quick
      mergekit-wp compare --suite suite.yml --out comparison/

    OUT gets results.jsonl (one line per item), summary.json, table.md, report.html and recipes/
    with the chosen parameters. Start the same command again after a crash: finished work is kept.
    """
    from mergekit_wp import api

    fields = given(CompareRequest, options) | given(SuiteRequest, options)
    if fields.get("suite") is not None:
        fields = _typed_only(context, fields)
    recipes = fields.pop("recipes", ())
    with progress(dry_run, then=partial(_after_fit, fields)) as bar:
        if dry_run and (suite := fields.get("suite")) is not None:
            beside = {name: value for name, value in fields.items() if name != "suite"}
            prepare(suite, beside, bar, only_to_plan=True)
        found = api.compare(*recipes, **fields, progress=bar)
    click.echo(found.table())
    click.echo(f"\nreport: {options['out'] / 'report.html'}")
    if found.failed:
        click.echo(
            f"mergekit-wp: failed: {', '.join(found.failed)}; the same command tries them again",
            err=True,
        )
        context.exit(1)


def _after_fit(fields: Mapping[str, Any], opened: Any) -> Costs | None:
    """Of a suite whose experts are fitted first, the comparison that follows."""
    from mergekit_wp.costs.comparison import comparing
    from mergekit_wp.joint.fit import FitOpened

    if not isinstance(opened, FitOpened):
        return None
    beside = {name: value for name, value in fields.items() if name not in WHOLE}
    return comparing(outlook(Path(beside.pop("suite")), beside))


def _typed_only(context: click.Context, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed: a default of the command does not override what a suite says."""
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in fields.items()
        if context.get_parameter_source(name) != default
    }
