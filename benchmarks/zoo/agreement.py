"""Divergence against answers on the zoo: all methods' grids, fits of many lengths, every skill.

``python -m benchmarks.zoo.agreement`` (from the repository's root) merges all three experts of each
seed by every setting of every method's grid and by fits that are ended early, measures each merge
on held-out prompts and on the test items of `benchmarks.zoo.bench`, and prints the tables of
README.md.
What is measured is kept in build/zoo/agreement.jsonl and resumes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.agreement import (
    Answers,
    Journal,
    Measured,
    Merge,
    Row,
    bins,
    criteria,
    partings,
    picture,
    ranking,
)
from benchmarks.zoo.bench import (
    BUILD,
    MAX_NEW_TOKENS,
    N_TEST,
    ROOT,
    SKILLS,
    checkpoints,
    fit_request,
    unlabelled,
)
from benchmarks.zoo.evaluate import accuracy, load_model
from benchmarks.zoo.tasks import distinct_items
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.making import Making
from mergekit_wp.comparison.methods import Method, methods_of, peers, weights_of
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.fit import fit
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.runs.progress import NoProgress

#: held-out prompts of each skill, of which no fit and no test item is
N_HELD_OUT = 256
#: unlabelled prompts a skill, granularities and ends of the fits
FITS = tuple(
    (n, granularity, steps)
    for n, granularity in ((256, "channel"), (32, "channel"), (256, "component"))
    for steps in (5, 10, 20, 40, 80, 160)
)
#: merges by weights of their own for each expert
N_DRAWN = 20


class World:
    """One seed: its experts' answers to held-out prompts, its test items, its merges."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.folder, self.scratch = seed, checkpoints(seed), scratch
        self.base, self.tokenizer = load_model(self.folder / "base")
        asked = TextInterface.of(self.folder / "base", self.tokenizer)
        self.expected = {}
        for skill in SKILLS:
            items = distinct_items(skill, "valid", seed + 1000, N_HELD_OUT)
            prompts = [self.tokenizer(item.prompt).input_ids for item in items]
            expert, _ = load_model(self.folder / skill)
            self.expected[skill] = Answers.of(expert, asked, prompts, MAX_NEW_TOKENS)
        self.items = {
            skill: [(i.prompt, i.answer) for i in distinct_items(skill, "test", seed, N_TEST)]
            for skill in SKILLS
        }

    def measured(self, model: Any) -> dict[str, Row]:
        """By skill."""
        return {
            skill: criteria(model, self.expected[skill])
            | {"accuracy": accuracy(model, self.tokenizer, self.items[skill])}
            for skill in SKILLS
        }

    def making(self, learning: bool) -> Making:
        """Makes merges as a comparison does."""
        prompts = tuple((e, unlabelled(self.folder, self.seed, e, 256)) for e in SKILLS)
        plan = Plan(
            base=str(self.folder / "base"),
            experts=tuple(str(self.folder / e) for e in SKILLS),
            names=SKILLS,
            recipe=None,
            extra={},
            methods=self.methods(learning),
            tasks=(),
            dtype="float32",
            device="cpu",
            eval_dtype=torch.float32,
            prompts=prompts if learning else (),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return Making(plan, self.scratch, self.scratch, "2026-11-29", NoProgress())

    def methods(self, learning: bool) -> tuple[Method, ...]:
        """Every peer with a grid of its own."""
        known = peers(len(SKILLS))
        names = [n for n, m in known.items() if not m.aim and (learning or not m.needs_prompts)]
        return methods_of(names, len(SKILLS), None)

    def drawn(self) -> list[Setting]:
        """Task arithmetic with a weight for each expert, drawn: a search would take known ones."""
        rng = np.random.default_rng(self.seed)
        keys = weights_of(len(SKILLS))
        every = rng.uniform(0.0, 1.3, (N_DRAWN, len(keys))).round(2).tolist()
        return [dict(zip(keys, values, strict=True)) for values in every]

    def merges(self, learning: bool) -> Iterator[Merge]:
        """All that is measured."""
        making = self.making(learning)

        @contextmanager
        def by_method(method: Method, setting: Setting) -> Iterator[Any]:
            with making.by_method(method, setting, 0) as made:
                yield made.model

        @contextmanager
        def by_fit(n: int, granularity: str, steps: int) -> Iterator[Any]:
            out = self.scratch / "fit"
            settings: dict[str, Any] = {"steps": steps, "granularity": granularity}
            request = fit_request(self.folder, self.seed, SKILLS, n, out, **settings)
            fit(request, NoProgress())
            with making.by_recipe(read_recipe(out / RECIPE).config, 0) as made:
                yield made.model

        @contextmanager
        def itself() -> Iterator[Any]:
            yield self.base

        yield Merge("base", "base", itself)
        for method in self.methods(learning):
            for setting in self.drawn() if method.searched else method.grid:
                name = f"{method.name} {setting}"
                yield Merge(name, "peer", partial(by_method, method, setting))
        for n, granularity, steps in FITS if learning else ():
            name = f"fit, {n} prompts, by {granularity}, {steps} steps"
            yield Merge(name, "ours", partial(by_fit, n, granularity, steps))


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default="0,1", help="Training seeds; the method was made on 0 and 1.")
@click.option("--learning", is_flag=True, help="Also fits, and peers that learn from prompts.")
@click.option("--print", "print_only", is_flag=True, help="Only print what there is.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the picture here.")
def main(seeds: str, learning: bool, print_only: bool, plot: Path | None) -> None:
    """Merge, measure, print."""
    torch.set_num_threads(1)
    ensure_registered()
    os.chdir(ROOT)
    journal = Journal(BUILD / "agreement.jsonl")
    chosen = [int(seed) for seed in seeds.split(",")]
    for seed in [] if print_only else chosen:
        with TemporaryDirectory() as scratch:
            world = World(seed, Path(scratch))
            for merge in tqdm(list(world.merges(learning)), unit="merge", mininterval=5):
                journal.measure(f"seed {seed}", merge, world.measured)
    rows = [row for row in journal.rows if int(row["group"].split()[1]) in chosen]
    found = Measured.of(rows)
    click.echo("\n\n".join([ranking(found), bins(found), partings(found)]))
    if plot is not None:
        picture(found).savefig(plot, dpi=110)


if __name__ == "__main__":
    main()
