"""Divergence against answers for a family of real models.

All experts together are merged by every setting of some peers' grids (benchmarks/grid.yml), by
task arithmetic with drawn weights, and by what was fitted, at several lambdas. Each merge is held
against the experts' answers to the validation prompts, which nothing was fitted on, and asked the
test items. What is measured is kept in the family's agreement.jsonl and resumes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from mergekit.options import MergeOptions
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
from benchmarks.combinations import make_missing, write_grid
from benchmarks.family import Family
from benchmarks.files import REPO, dtype, local
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.comparison.making import Made, Making
from mergekit_wp.comparison.methods import (
    Method,
    peers,
    read_grid,
    weights_of,
)
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.rows import Setting
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.encoding import encode_prompt
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

#: peers that need nothing but weights, of which grids are given
METHODS = ("task_arithmetic", "ties", "dare_linear", "tsv_merge", "iso_c", "consensus_ta")
#: merges by weights of their own for each expert
N_DRAWN = 12
#: of what was fitted
LAMBDAS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class World:
    """One family: its experts' answers to held-out prompts, its test items, its merges."""

    def __init__(self, family: Family, scratch: Path) -> None:
        self.family = family
        experts = tuple(family.reference(skill) for skill in family.skills)
        plan = Plan(
            base=local(family.base),
            experts=experts,
            names=family.skills,
            recipe=None,
            extra={},
            methods=(),
            tasks=(),
            dtype="float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
            eval_dtype=dtype(),
        )
        options = MergeOptions(quiet=True, lora_merge_cache=str(scratch / "adapters"))
        self.making = Making(plan, scratch, scratch, "2026-11-29", NoProgress(), options)
        checkers = Checkers.load(REPO / family.here / "checkers.py")
        self.tasks = {s: JsonlTask.read(family.task(s), checkers) for s in family.skills}
        self.expected = {}
        for skill, reference in zip(family.skills, experts, strict=True):
            items = self.tasks[skill].of("valid")
            longest = max(map(self.tasks[skill].length, items))
            with self.making.checkpoint(Checkpoint(reference)) as made:
                prompts = [encode_prompt(made.asked.tokenizer, i["prompt"]) for i in items]
                self.expected[skill] = Answers.of(made.model, made.asked, prompts, longest)

    def measured(self, made: Any) -> dict[str, Row]:
        """By skill."""
        found = {}
        for skill, task in self.tasks.items():
            scores = [item.score for item in task.evaluate(made.model, made.asked, "test")]
            own = criteria(made.model, self.expected[skill])
            found[skill] = own | {"accuracy": float(np.mean(scores))}
        return found

    def methods(self) -> list[tuple[Method, tuple[Setting, ...]]]:
        """Peers with their grids."""
        known = peers(len(self.family.skills))
        grids = read_grid(write_grid(self.family.build / "grid-agreement.yml", METHODS), known)
        rng = np.random.default_rng(self.family.seed)
        keys = weights_of(len(self.family.skills))
        every = rng.uniform(0.0, 1.3, (N_DRAWN, len(keys))).round(2).tolist()
        drawn = tuple(dict(zip(keys, values, strict=True)) for values in every)
        searched = next(method for method in known.values() if method.searched)
        return [*((known[name], grids[name]) for name in METHODS), (searched, drawn)]

    def merges(self) -> Iterator[Merge]:
        """All that is measured."""
        making, family = self.making, self.family

        def itself() -> AbstractContextManager[Made]:
            return making.checkpoint(Checkpoint(local(family.base)))

        def by_fit(recipe: Path, lam: float) -> AbstractContextManager[Made]:
            config = read_recipe(recipe).config
            config.parameters = (config.parameters or {}) | {"lambda": lam}
            return making.by_recipe(config, 0)

        yield Merge("base", "base", itself)
        for method, settings in self.methods():
            for setting in settings:
                by_peer = partial(making.by_method, method, setting, 0)
                yield Merge(f"{method.name} {setting}", "peer", by_peer)
        name = "-".join(family.skills)
        for recipe in sorted((family.folder / "fitting").glob(f"{name}*/recipe.yml")):
            for lam in LAMBDAS:
                ours = partial(by_fit, recipe, lam)
                yield Merge(f"{recipe.parent.name}, lambda {lam}", "ours", ours)


def main(family: Family) -> click.Command:
    """The command of a family."""

    @click.command(context_settings={"show_default": True})
    @click.option("--print", "print_only", is_flag=True, help="Only print what there is.")
    @click.option("--plot", type=click.Path(path_type=Path), help="Write the picture here.")
    def command(print_only: bool, plot: Path | None) -> None:
        """Merge, measure, print."""
        ensure_registered()
        os.chdir(REPO)
        journal = Journal(family.folder / "agreement.jsonl")
        if not print_only:
            make_missing(family)
            with TemporaryDirectory() as scratch:
                world = World(family, Path(scratch))
                for merge in tqdm(list(world.merges()), unit="merge", mininterval=5):
                    journal.measure(family.name, merge, world.measured)
        found = Measured.of(journal.rows)
        click.echo("\n\n".join([ranking(found), bins(found), partings(found)]))
        if plot is not None:
            picture(found).savefig(plot, dpi=110)

    return command
