"""Train the three experts: one in full, two by LoRA, merged into checkpoints.

``python -m benchmarks.gemma3.experts`` writes build/gemma3/experts/NAME, and beside it the
adapters; with another ``--seed`` to build/gemma3/seed-N.
"""

from __future__ import annotations

import resource
from dataclasses import replace

import click

from benchmarks.files import read_jsonl
from benchmarks.gemma3.tasks import COUNTS, GEMMA3, STREAMS
from benchmarks.items import unique
from benchmarks.training import Recipe, merge_adapter, save_adapter, save_full, train

RECIPES = {
    "dates": Recipe(steps=60, batch_size=12, rate=2e-3, rank=8),
    "reversal": Recipe(steps=60, batch_size=16, rate=2e-3, rank=8),
    "records": Recipe(steps=45, batch_size=8, rate=1e-4),
}


@click.command()
@click.option("--only", type=click.Choice(GEMMA3.skills), multiple=True, help="Only these experts.")
@click.option("--seed", default=0, show_default=True)
def main(only: tuple[str, ...], seed: int) -> None:
    """Train the experts and write their checkpoints."""
    family = replace(GEMMA3, seed=seed)
    for name in only or family.skills:
        rows = read_jsonl(family.build / "data" / f"{name}.jsonl")
        items = unique(STREAMS[name]("valid", 0), COUNTS["valid"])
        valid = [{"prompt": i.prompt, "response": i.response} for i in items]
        recipe, out = RECIPES[name], family.expert(name)
        model, exact = train(family.base, rows, valid, recipe, seed, name)
        if recipe.rank is None:
            save_full(model, exact, family.base, out)
        else:
            adapter = family.folder / "adapters" / name
            save_adapter(model, adapter, "google/gemma-3-270m")
            merge_adapter(family.base, adapter, out)
        used = resource.getrusage(resource.RUSAGE_SELF)
        click.echo(f"{out}: {used.ru_utime + used.ru_stime:.0f} CPU s so far")


if __name__ == "__main__":
    main()
