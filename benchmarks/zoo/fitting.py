"""Jointly fitted gates on the zoo: how far they reach, and what they need.

``python -m benchmarks.zoo.fitting`` (from the repository's root) fits the gates of every
combination on five training seeds, measures the merges on the test items of `benchmarks.zoo.bench`
and prints the tables of README.md. Everything is kept in build/zoo and resumes.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from scipy.stats import spearmanr, t
from tqdm import tqdm

from benchmarks.fitting import fit_by_tensor
from benchmarks.zoo.bench import (
    COMBINATIONS,
    N_TEST,
    ROOT,
    SKILLS,
    alone,
    checkpoints,
    competent_seeds,
    fit_request,
    scored_alone,
)
from benchmarks.zoo.evaluate import accuracy, load_model
from benchmarks.zoo.lab import Lab
from benchmarks.zoo.tasks import distinct_items
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.files import scorefile
from mergekit_wp.files.scorefile import ScoreFile
from mergekit_wp.joint.files import RECIPE
from mergekit_wp.joint.fit import fit
from mergekit_wp.joint.request import FitRequest
from mergekit_wp.merging.model_references import data_of
from mergekit_wp.merging.recipe import read as read_recipe
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.terms import SLICED_KINDS

ALL = COMBINATIONS[-1]
#: unlabelled prompts a skill
N = 2048
#: of AdaMerging's objective, which is not ours to find
STEPS, A_STEP = 80, 64
OURS, COARSE = "fit", "fit, one gate a tensor"
FITS = {OURS: N, "fit, 256 prompts": 256, "fit, 32 prompts": 32}
#: seeds of the second table
N_MORE = 3
Measured = dict[str, Any]
Rows = dict[tuple[str, ...], dict[str, Measured]]


def measure(model: Any, tokenizer: Any, seed: int) -> Measured:
    """Accuracy on the test items of every skill, and of copying, which no expert was taught."""
    found = {}
    for skill in (*SKILLS, "copy"):
        items = distinct_items(skill, "test", seed, N_TEST)
        found[skill] = accuracy(model, tokenizer, [(i.prompt, i.answer) for i in items])
    return found


def merged(config: MergeConfiguration, seed: int) -> Measured:
    """Merge in float32 by stock mergekit, and measure."""
    config.dtype = "float32"
    with TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions(write_model_card=False, copy_tokenizer=True))
        return measure(*load_model(folder), seed)


class Seed:
    """All rows of one training seed; what was measured before is read."""

    def __init__(self, seed: int) -> None:
        self.seed, self.folder = seed, checkpoints(seed)

    def kept(self, experts: tuple[str, ...], name: str, make: Callable[[], Measured]) -> Measured:
        """What was measured before, or now."""
        stem = re.sub(r"[^a-z0-9]+", "-", name)
        path = self.folder / "fitting" / "-".join(experts) / f"{stem}.json"
        if not path.exists():
            began = time.process_time()
            found = make()
            found["cpu"] = time.process_time() - began
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return dict(json.loads(path.read_text()))

    def request(self, experts: tuple[str, ...], n: int, **options: Any) -> FitRequest:
        """The fit of one row."""
        out = self.folder / "fitting" / "-".join(experts) / "working"
        return fit_request(self.folder, self.seed, experts, n, out, **options)

    def fitted(
        self, experts: tuple[str, ...], n: int = N, *, guarded: bool = True, **options: Any
    ) -> Measured:
        """Fit, merge by stock mergekit, measure; with the history, and how it meets scores."""
        request = self.request(experts, n, guarded=guarded, **options)
        read = list(fit(request, NoProgress()).values())
        assert request.out is not None
        recipe = data_of(read_recipe(request.out / RECIPE).config, exclude_none=True)
        found = merged(MergeConfiguration.model_validate(recipe), self.seed)
        how = read[0].manifest.fit
        assert how is not None

        looks = [(m.step, m.judged) for m in how.history if m.judged is not None]
        found["history"] = [
            (step, float(np.mean([seen[e].answers for e in experts]))) for step, seen in looks
        ]
        if experts == ALL and n == N and guarded:
            found["rank"] = {"share": self.agreement(read)}
        return found

    def coarse(self, experts: tuple[str, ...]) -> Measured:
        """The same fit with one gate a tensor."""
        model, _ = fit_by_tensor(self.request(experts, N, guarded=False), 0.5, NoProgress())
        return measure(model.eval(), load_model(self.folder / "base")[1], self.seed)

    def entropy(self) -> Measured:
        """AdaMerging's objective."""
        lab = Lab(self.folder, self.seed, N)
        lab.model.load_state_dict(lab.entropies(0.5, STEPS, 0.1, A_STEP), strict=False)
        return measure(lab.model.eval(), lab.tokenizer, self.seed)

    def agreement(self, fitted: Sequence[ScoreFile]) -> float:
        """Spearman's correlation of fitted gates with shares, over all neurons and heads."""
        gates, shares = [], []
        for file, expert in zip(fitted, ALL, strict=True):
            scored = scorefile.read(alone(self.folder, self.seed, expert))
            for kind in SLICED_KINDS:
                gates.append(file.scores("path", "kl", kind).flatten())
                shares.append(scored.scores("share", "kl", kind).flatten())
        return float(spearmanr(torch.cat(gates), torch.cat(shares))[0])

    def plain(self, method: str, **parameters: Any) -> Measured:
        """One of mergekit's own methods on all experts, untuned."""
        models = [{"model": str(self.folder / e), "parameters": parameters} for e in ALL]
        data = {
            "merge_method": method,
            "base_model": str(self.folder / "base"),
            "models": models,
            "tokenizer_source": "base",
        }
        return merged(MergeConfiguration.model_validate(data), self.seed)

    def rows(self, combinations: Sequence[tuple[str, ...]], more: bool) -> Rows:
        """What is measured on this seed; more than the main rows if asked for."""
        found: Rows = {}
        for c in combinations:
            found[c] = {
                name: self.kept(c, name, lambda c=c, n=n: self.fitted(c, n))
                for name, n in FITS.items()
            }
        for e in (*SKILLS, "base"):
            model = self.folder / e
            itself = self.kept((e,), "itself", lambda m=model: measure(*load_model(m), self.seed))
            found[(e,)] = {"itself": itself}
        if more:
            found[ALL] |= self.more()
        return found

    def more(self) -> dict[str, Measured]:
        """What a fit needs, and what else there is: all three experts."""
        by_share = self.folder / "fitting" / "by-share.yml"
        shares = scored_alone(self.folder, self.seed, ALL)
        by_share.write_text(shares.to_yaml())
        makers: dict[str, Callable[[], Measured]] = {
            "fit, unguarded": lambda: self.fitted(ALL, guarded=False),
            COARSE: lambda: self.coarse(ALL),
            "fit, 8 prompts": lambda: self.fitted(ALL, 8),
            "fit from shares": lambda: self.fitted(
                ALL, guarded=False, start="scores", recipe=by_share
            ),
            "entropy, one gate a tensor": self.entropy,
            "shares": lambda: merged(shares, self.seed),
            "plain averaging": lambda: self.plain("task_arithmetic", weight=1 / 3),
            "ties": lambda: self.plain("ties", weight=1.0, density=0.5),
        }
        return {name: self.kept(ALL, name, make) for name, make in makers.items()}


def interval(values: list[float]) -> str:
    """Mean over seeds with Student's 95% interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def tables(found: dict[int, Rows], combinations: Sequence[tuple[str, ...]]) -> str:
    """The tables in Markdown."""

    def value(
        rows: dict[tuple[str, ...], dict[str, Measured]], c: tuple[str, ...], name: str
    ) -> float:
        return float(np.mean([rows[c][name][e] / rows[(e,)]["itself"][e] for e in c]))

    def worst(name: str) -> float:
        """Of all skills, combinations and seeds."""
        return min(
            rows[c][name][e] / rows[(e,)]["itself"][e]
            for rows in found.values()
            for c in combinations
            for e in c
        )

    names = ["+".join(c) if len(c) < 3 else "all three" for c in combinations]
    lines = ["| method | " + " | ".join(names) + " | mean, 95% | fit minus it | worst skill |"]
    lines.append("|---|" + "---:|" * (len(names) + 3))
    means = {
        name: [
            float(np.mean([value(rows, c, name) for c in combinations])) for rows in found.values()
        ]
        for name in FITS
    }
    for name, mean in means.items():
        cells = [
            f"{np.mean([value(r, c, name) for r in found.values()]):.2f}" for c in combinations
        ]
        gap = [a - b for a, b in zip(means[OURS], mean, strict=True)]
        lines.append(
            f"| {name} | "
            + " | ".join(cells)
            + f" | {interval(mean)} | "
            + ("" if name == OURS else interval(gap))
            + f" | {worst(name):.2f} |"
        )
    lines += [
        "",
        "| all three | mean of skills, 95% | copying | steps to 95% of the best | CPU, x fit |",
    ]
    lines.append("|---|---:|---:|---:|---:|")
    first = next(iter(found.values()))
    fully = [rows for rows in found.values() if rows[ALL].keys() == first[ALL].keys()]
    for name in first[ALL]:
        of_seeds = [rows[ALL][name] for rows in fully]
        skills = interval([value(rows, ALL, name) for rows in fully])
        copying = interval([row["copy"] for row in of_seeds])
        steps, cost = "", ""
        if "history" in of_seeds[0]:
            steps = f"{np.mean([_reached(rows[ALL], name) for rows in fully]):.0f}"
            ratio = [rows[ALL][name]["cpu"] / rows[ALL][OURS]["cpu"] for rows in fully]
            cost = f"{np.mean(ratio):.2f}"
        lines.append(f"| {name} | {skills} | {copying} | {steps} | {cost} |")
    base = interval([rows[("base",)]["itself"]["copy"] for rows in found.values()])
    ranks = interval([rows[ALL][OURS]["rank"]["share"] for rows in found.values()])
    lines += ["", f"The base copies {base}. Spearman's correlation of fitted gates with"]
    lines.append(f"`share` alone: {ranks}")
    return "\n".join([*lines, "", *curve([rows[ALL][OURS]["history"] for rows in found.values()])])


def curve(histories: Sequence[Sequence[tuple[int, float]]]) -> list[str]:
    """Quality over steps: a table of the answers reproduced, mean of skills and seeds.

    A fit that ended before stays where it was.
    """
    steps = sorted({step for history in histories for step, _ in history})
    lines = ["| steps | answers reproduced, all three |", "|---:|---:|"]
    for step in steps:
        here = [[value for at, value in history if at <= step][-1] for history in histories]
        lines.append(f"| {step} | {np.mean(here):.2f} |")
    return lines


def _reached(rows: dict[str, Measured], name: str) -> float:
    """Steps until answers reproduced are within 95% of the plain fit's best, NaN if never."""
    goal = 0.95 * max(value for _, value in rows[OURS]["history"])
    history = rows[name]["history"]
    return next((step for step, value in history if value >= goal), float("nan"))


@click.command(context_settings={"show_default": True})
@click.option("--seeds", help="Training seeds: 2,4,6.  [default: those of the benchmark]")
@click.option("--more", default=N_MORE, help="Measure the second table's rows on so many of them.")
@click.option("--three", is_flag=True, help="Measure the combination of all three experts only.")
def main(seeds: str | None, more: int, three: bool) -> None:
    """Fit, merge, measure, print."""
    torch.set_num_threads(1)
    ensure_registered()
    os.chdir(ROOT)
    chosen = [int(seed) for seed in seeds.split(",")] if seeds else competent_seeds()
    combinations = COMBINATIONS[-1:] if three else COMBINATIONS
    for seed in tqdm(chosen, unit="seed"):
        Seed(seed).rows(combinations, more=False)
    found = {
        seed: Seed(seed).rows(combinations, more=i < more)
        for i, seed in enumerate(tqdm(chosen, unit="seed, more rows"))
    }
    click.echo(tables(found, combinations))


if __name__ == "__main__":
    main()
