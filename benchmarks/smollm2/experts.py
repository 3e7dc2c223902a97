"""The three experts: fine-tunes of the base, by one training seed or another.

``python -m benchmarks.smollm2.experts`` builds build/smollm2/experts/NAME from the committed
adapters in ``adapters/``; ``--train`` fine-tunes anew and replaces the adapter. ``--seed N``
fine-tunes with another seed to build/smollm2/seed-N, where ``FULL`` has it one expert in full.
"""

from __future__ import annotations

import resource
from dataclasses import replace

import click

from benchmarks.files import REPO, read_jsonl
from benchmarks.smollm2.paths import SMOLLM2
from benchmarks.training import Recipe, merge_adapter, save_adapter, save_full, train

ADAPTERS = REPO / "benchmarks" / "smollm2" / "adapters"
# About the fewest steps that leave an expert 25 points or more above the base.
RECIPES = {
    "instruction": Recipe(steps=100, batch_size=12, rate=2e-3, rank=8),
    "math": Recipe(steps=160, batch_size=16, rate=2e-3, rank=8),
    "code": Recipe(steps=40, batch_size=16, rate=2e-3, rank=8),
}
#: experts that a training seed fine-tunes in full, and at which rate
FULL = {1: {"code": 1e-4}}


@click.command()
@click.option("--only", type=click.Choice(SMOLLM2.skills), multiple=True, help="Only these.")
@click.option("--train", "anew", is_flag=True, help="Fine-tune instead of using the adapters.")
@click.option("--seed", default=0, show_default=True, help="Of training; adapters are of seed 0.")
def main(only: tuple[str, ...], anew: bool, seed: int) -> None:
    """Build the experts' checkpoints, from adapters or by training."""
    family = replace(SMOLLM2, seed=seed)
    for name in only or family.skills:
        out, recipe = family.expert(name), RECIPES[name]
        adapter = (family.folder / "adapters" if seed else ADAPTERS) / name
        if anew or seed:
            if rate := FULL.get(seed, {}).get(name):
                recipe = replace(recipe, rate=rate, rank=None)
            rows = read_jsonl(family.build / "data" / f"{name}.jsonl")
            model, exact = train(family.base, rows, (), recipe, seed, name)
            if recipe.rank is None:
                save_full(model, exact, family.base, out)
            else:
                save_adapter(model, adapter, "HuggingFaceTB/SmolLM2-135M-Instruct")
        if recipe.rank is not None:
            merge_adapter(family.base, adapter, out)
        used = resource.getrusage(resource.RUSAGE_SELF)
        click.echo(f"{out}: {used.ru_utime + used.ru_stime:.0f} CPU s so far")


if __name__ == "__main__":
    main()
