"""``python -m benchmarks.forecast.bench``: forecasts held against real runs of SmolLM2.

Needs the experts of `benchmarks.smollm2` (``make bench``). ``--paper`` prints what models would
take that are too large to run here.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.combinations import make_missing
from benchmarks.forecast.measure import commands, measured
from benchmarks.forecast.paper import paper
from benchmarks.smollm2.paths import BUILD, SMOLLM2

GIB = 2**30


@click.command()
@click.option("--paper", "on_paper", is_flag=True, help="Only print the plan of large models.")
@click.option("--only", type=click.Choice(list(commands(Path()))), help="Only this command.")
@click.option("--plans", is_flag=True, help="Also print every plan.")
def main(on_paper: bool, only: str | None, plans: bool) -> None:
    """Hold forecasts against real runs, each in a process of its own."""
    if on_paper:
        click.echo(paper())
        return
    make_missing(SMOLLM2)
    click.echo("| command | time said | took | said / took | memory said | took | said / took |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    with TemporaryDirectory(dir=BUILD) as folder:
        names = list(commands(Path(folder)))
        # a curve is of a score file
        chosen = names if only is None else [n for n in names if n in ("score", only)]
        for name in chosen:
            found = measured(name, Path(folder))
            (said, took), (held, peak) = found.seconds, found.memory
            click.echo(
                f"| `{name}` | {said:.0f} s | {took:.0f} s | {said / took:.2f} | "
                f"{held / GIB:.2f} GiB | {peak / GIB:.2f} GiB | {held / peak:.2f} |"
            )
            if plans:
                click.echo(f"\n{found.table}\n")


if __name__ == "__main__":
    main()
