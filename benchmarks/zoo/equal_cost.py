"""The guided path beside the fit at equal CPU seconds, by number of prompts.

``python -m benchmarks.zoo.equal_cost`` (from the repository's root) scores all three experts
together by the guided path of 10 and of 40 steps, fits them with several ends, merges by each, and
measures the test items. Everything is kept in build/zoo and resumes. The path knows no guard.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import numpy as np
import torch
from mergekit.config import MergeConfiguration
from tqdm import tqdm

from benchmarks.zoo.bench import ROOT
from benchmarks.zoo.evaluate import load_model
from benchmarks.zoo.fitting import ALL, Measured, Seed, measure, merged
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.joint.company import score_company
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import CompanyRequest
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.runs.progress import NoProgress

#: unlabelled prompts a skill
PROMPTS = (8, 16, 32, 128)
PATH_STEPS = (10, 40)
FIT_STEPS = (10, 30, 100, 600)


def made(folder: Path, began: float, seed: int) -> Measured:
    """What the scores of a folder merge to, and the CPU seconds that they took."""
    spent = time.process_time() - began
    recipe = data_of(read_recipe(folder / RECIPE).config, exclude_none=True)
    return {"spent": spent} | merged(MergeConfiguration.model_validate(recipe), seed)


class Row(Seed):
    """One training seed's merges."""

    def itself(self, expert: str) -> Measured:
        """An expert alone."""
        model = self.folder / expert
        return self.kept((expert,), "itself", lambda: measure(*load_model(model), self.seed))

    def path(self, n: int, steps: int) -> Measured:
        """By the guided path."""
        out, began = self.folder / "equal-cost", time.process_time()
        request = CompanyRequest(
            recipe=self.recipe(ALL),
            prompts=tuple((e, self.unlabelled(e, n)) for e in ALL),
            out=out,
            path_steps=steps,
            max_new_tokens=14,
            restart=True,
            overwrite=True,
        )
        score_company(request, NoProgress())
        return made(out, began, self.seed)

    def gates(self, n: int, steps: int, guarded: bool) -> Measured:
        """By the fit."""
        out, began = self.folder / "equal-cost-fit", time.process_time()
        options = {"guards": self.guard} if guarded else {}
        fit(self.request(ALL, n, steps=steps, out=out, **options), NoProgress())
        return made(out, began, self.seed)

    def every(self) -> dict[tuple[int, str], Measured]:
        """By number of prompts and name of the row."""
        found = {}
        for n in tqdm(PROMPTS, desc=f"seed {self.seed}"):
            for steps in PATH_STEPS:
                name = f"path, {steps} steps"
                found[n, name] = self.kept(
                    ALL, f"equal cost {n} {name}", lambda n=n, s=steps: self.path(n, s)
                )
            for guarded in (False, True):
                for steps in FIT_STEPS:
                    name = f"fit, {'guarded' if guarded else 'unguarded'}, {steps} steps"
                    found[n, name] = self.kept(
                        ALL,
                        f"equal cost {n} {name}",
                        lambda n=n, s=steps, g=guarded: self.gates(n, s, g),
                    )
        return found


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default="0", help="Training seeds; the method was made on 0 and 1.")
def main(seeds: str) -> None:
    """Score, fit, merge, measure, print."""
    torch.set_num_threads(1)
    ensure_registered()
    os.chdir(ROOT)
    found, itself = [], []
    for seed in map(int, seeds.split(",")):
        rows = Row(seed)
        itself.append({e: rows.itself(e)[e] for e in ALL})
        found.append(rows.every())
    click.echo("| prompts a skill | row | CPU s | mean of skills | worst skill | copying |")
    click.echo("|---:|---|---:|---:|---:|---:|")
    for n, name in found[0]:
        of_seeds = [rows[n, name] for rows in found]
        relative = [
            [row[e] / own[e] for e in ALL] for row, own in zip(of_seeds, itself, strict=True)
        ]
        spent, copying = (np.mean([row[key] for row in of_seeds]) for key in ("spent", "copy"))
        cells = [f"{spent:.0f}", f"{np.mean(relative):.2f}", f"{np.min(relative):.2f}"]
        click.echo(f"| {n} | {name} | {' | '.join(cells)} | {copying:.2f} |")


if __name__ == "__main__":
    main()
