"""What a fit keeps of every skill, what it costs elsewhere, and in CPU seconds.

A family's combinations are fitted by `mergekit-wp fit` with its defaults, merged, and asked the
test items; perplexity is read on plain text of three registers. Everything is kept as files under
the family's ``fitting/``, one after another, so that a killed run goes on, and a table can be
printed of what there is.
"""

from __future__ import annotations

import json
import re
import resource
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.family import Family, only_option
from benchmarks.files import REPO, command, device, local, read_jsonl, write_jsonl
from benchmarks.perplexity import RESAMPLES, ratio, registers, surprise
from benchmarks.pooled import Pooled
from mergekit_wp.comparison.table import interval
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

#: unlabelled prompts of each skill, unless another number is asked for
N = 32
Found = dict[str, Any]


@contextmanager
def spending(path: Path) -> Iterator[None]:
    """Add the CPU seconds of what is done meanwhile, and of its processes, to a file."""

    def used() -> float:
        every = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in every)

    path.parent.mkdir(parents=True, exist_ok=True)
    began = used()
    try:
        yield
    finally:
        before = json.loads(path.read_text()) if path.exists() else 0.0
        path.write_text(json.dumps(before + used() - began))


@dataclass(frozen=True)
class FitTable:
    """The fits of one family and training seed.

    Attributes:
        family: whose.
        options: further options of `mergekit-wp fit`; their results are kept apart.
        extra: further task files by name, asked of every model and shown beside the skills.
        n: unlabelled prompts of each skill, or as many as it has; other results are kept apart.
    """

    family: Family
    options: tuple[str, ...] = ()
    extra: Mapping[str, Path] = field(default_factory=dict)
    n: int = N

    @property
    def folder(self) -> Path:
        """Where all of it is kept."""
        return self.family.folder / "fitting"

    def name(self, experts: Sequence[str]) -> str:
        """A combination under these options, as files are named."""
        words = [*([] if self.n == N else [f"{self.n} prompts"]), *self.options]
        label = re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")
        return "-".join(experts) + (f"+{label}" if label else "")

    def unlabelled(self, skill: str) -> Path:
        """Its prompts: the expert's own answers are taken."""
        apart = "" if self.n == N else f"-{self.n}"
        path = self.folder / f"prompts{apart}" / f"{skill}.jsonl"
        bare = [{"prompt": r["prompt"]} for r in read_jsonl(self.family.prompts(skill))[: self.n]]
        if len(bare) < self.n:  # the file may be older than what the tasks write today
            click.echo(
                f"{skill}: {self.n} prompts are asked for, {len(bare)} are there; 'python -m "
                f"benchmarks.{self.family.name}.tasks' writes all it has",
                err=True,
            )
        if not path.exists() or read_jsonl(path) != bare:
            write_jsonl(path, bare)
        return path

    def recipe(self, experts: Sequence[str]) -> Path:
        """A recipe that names the experts."""
        path = self.folder / "experts" / f"{'-'.join(experts)}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        models = [{"model": self.family.reference(e)} for e in experts]
        data = {"merge_method": "task_arithmetic", "base_model": local(self.family.base)}
        path.write_text(yaml.safe_dump(data | {"models": models}))
        return path

    def fitted(self, experts: Sequence[str], max_new_tokens: int) -> Path:
        """The recipe that merges by the fitted gates."""
        out = self.folder / self.name(experts)
        if not (out / "recipe.yml").exists():
            pairs = [f"{e}={local(self.unlabelled(e))}" for e in experts]
            with spending(self.folder / "cpu" / f"{self.name(experts)}.json"):
                command(
                    *("mergekit-wp", "fit", local(self.recipe(experts)), "--out", local(out)),
                    *(part for pair in pairs for part in ("--prompts", pair)),
                    *("--max-new-tokens", str(max_new_tokens), *self.options),
                )
        return out / "recipe.yml"

    def measure(self, checkpoint: Path, skills: Sequence[str]) -> Found:
        """Answers to the test items with their scores, and surprise by text of each register."""
        tokenizer = AutoTokenizer.from_pretrained(self.family.base)
        asked = TextInterface.of(self.family.base, tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model = model.to(device()).eval()
        checkers = Checkers.load(REPO / self.family.here / "checkers.py")
        found: Found = {"scores": {}, "answers": {}}
        found["surprise"] = {
            register: surprise(model, tokenizer, texts).tolist()
            for register, texts in registers().items()
        }
        tasks = {skill: self.family.task(skill) for skill in skills} | dict(self.extra)
        for name, path in tasks.items():
            items = JsonlTask.read(path, checkers).evaluate(model, asked, "test")
            found["scores"][name] = [item.score for item in items]
            found["answers"][name] = [item.output for item in items]
        return found

    @property
    def committed(self) -> Path:
        """What was measured for the tables of the README, without answers."""
        return REPO / self.family.here / "measured" / f"seed-{self.family.seed}"

    def record(self) -> None:
        """Commit what was measured here for this table: scores, surprise and seconds."""
        combinations = map(self.name, self.family.combinations)
        for name in ("base", *self.family.skills, *combinations):
            path = self.folder / "measured" / f"{name}.json"
            if not path.exists():
                continue
            found = json.loads(path.read_text())
            del found["answers"]
            if (spent := self.folder / "cpu" / path.name).exists():
                found["cpu"] = round(json.loads(spent.read_text()))
            self.committed.mkdir(parents=True, exist_ok=True)
            (self.committed / path.name).write_text(json.dumps(found) + "\n")

    def kept(self, name: str, make: Callable[[], Found] | None) -> Found | None:
        """What was measured before, or now; where nothing is to be made, what is committed."""
        path = self.folder / "measured" / f"{name}.json"
        if make is None and not path.parent.exists():  # else experts might be of another training
            path = self.committed / path.name
        if not path.exists():
            if make is None:
                return None
            found = json.dumps(make())
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(found)
            partial.replace(path)
        return dict(json.loads(path.read_text()))

    def merged(self, experts: Sequence[str], max_new_tokens: int) -> Found:
        """Fit, merge, measure; the merged checkpoint is removed."""
        recipe = self.fitted(experts, max_new_tokens)
        with TemporaryDirectory(dir=self.family.build) as scratch:
            out = Path(scratch) / "merged"
            command("mergekit-wp", "merge", local(recipe), str(out), "--quiet", quiet=True)
            return self.measure(out, experts)

    def base_and_experts(self) -> None:
        """Measure what combinations are held against."""
        every = self.family.skills
        self.kept("base", lambda: self.measure(self.family.base, every))
        for skill in every:
            self.kept(skill, partial(self.measure, self.family.expert(skill), (skill,)))

    def cpu(self, experts: Sequence[str], found: Found) -> float | None:
        """CPU seconds of a fit, over all its runs."""
        path = self.folder / "cpu" / f"{self.name(experts)}.json"
        return float(json.loads(path.read_text())) if path.exists() else found.get("cpu")

    def rows(self) -> list[Row]:
        """What was measured so far."""
        base = self.kept("base", None)
        if base is None:
            return []
        seed = self.family.seed
        found = [Row("base", base, base, seed)]
        experts = {e: self.kept(e, None) for e in self.family.skills}
        found += [Row(f"expert {e}", own, base, seed) for e, own in experts.items() if own]
        for combination in self.family.combinations:
            merge = self.kept(self.name(combination), None)
            beside = {e: own["scores"][e] for e in combination if (own := experts[e])}
            if merge and len(beside) == len(combination):
                label = " + ".join(combination)
                cpu = self.cpu(combination, merge)
                found.append(Row(label, merge, base, seed, beside, cpu))
        return found


@dataclass(frozen=True)
class Row:
    """A model that was measured: the base, an expert, or a merge.

    Attributes:
        label: what it is.
        found: by `FitTable.measure`.
        base: likewise, of the base.
        seed: of the experts' training.
        experts: test scores of each skill's own expert, of a merge.
        cpu: seconds of the fit.
    """

    label: str
    found: Found
    base: Found
    seed: int = 0
    experts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    cpu: float | None = None

    def by_skill(self) -> dict[str, float]:
        """Each skill relative to its expert."""
        return {s: share(self.found["scores"][s], own) for s, own in self.experts.items()}

    def draws(self) -> np.ndarray:
        """Resamples of the mean of `by_skill`: items, paired with the expert's."""
        rng = np.random.default_rng(0)
        drawn = []
        for skill, own in self.experts.items():
            ours, theirs = np.array(self.found["scores"][skill]), np.array(own)
            chosen = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
            right = np.maximum(theirs[chosen].mean(1), 1 / len(theirs))
            drawn.append(ours[chosen].mean(1) / right)
        return np.asarray(np.mean(drawn, axis=0))

    def perplexities(self) -> dict[str, tuple[float, float, float]]:
        """Relative to the base with 95% intervals, by register and of all texts ("all")."""
        ours, first = self.found["surprise"], self.base["surprise"]
        rows = {
            register: (np.array(ours[register]), np.array(first[register])) for register in ours
        }
        both = [np.concatenate(side) for side in zip(*rows.values(), strict=True)]
        rows["all"] = (both[0], both[1])
        return {name: ratio(mine, theirs) for name, (mine, theirs) in rows.items()}


def share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean score relative to the expert's.

    Raises:
        ClickException: the expert has nothing right.
    """
    if not np.mean(theirs):
        raise click.ClickException("an expert has no test item right; train it anew")
    return float(np.mean(ours) / np.mean(theirs))


def table(rows: Sequence[Row], skills: Sequence[str]) -> str:
    """The rows in Markdown, and the mean over merges: an interval over items, or over seeds."""
    seeds = sorted({row.seed for row in rows})
    names = list(dict.fromkeys([*skills, *(n for row in rows for n in row.found["scores"])]))
    places = [place for place in rows[0].perplexities() if place != "all"]
    head = ["model", "relative to the experts", "worst skill", *names]
    head += ["perplexity, x base", *places, "CPU s of the fit"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = ["", ""]
        if row.experts:
            low, high = np.quantile(row.draws(), [0.025, 0.975])
            relative = row.by_skill()
            cells[0] = f"{np.mean(list(relative.values())):.2f} [{low:.2f}, {high:.2f}]"
            cells[1] = f"{min(relative.values()):.2f}"
        scores = row.found["scores"]
        cells += [f"{np.mean(scores[name]):.2f}" if name in scores else "" for name in names]
        costs = row.perplexities()
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*costs["all"]))
        cells += [f"{costs[place][0]:.2f}" for place in places]
        cells.append("" if row.cpu is None else f"{row.cpu:.0f}")
        label = row.label if len(seeds) == 1 else f"seed {row.seed}: {row.label}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if merges := [row for row in rows if row.experts]:
        parts: dict[int, list[tuple[float, np.ndarray]]] = {}
        for row in merges:
            mean = float(np.mean(list(row.by_skill().values())))
            parts.setdefault(row.seed, []).append((mean, row.draws()))
        pooled = Pooled.of(parts)
        mean = pooled.bootstrap() if len(parts) == 1 else pooled.t_interval()
        worst = min(min(row.by_skill().values()) for row in merges)
        costs = [
            np.mean([row.perplexities()["all"][0] for row in merges if row.seed == seed])
            for seed in parts
        ]
        cells = [interval(mean), f"{worst:.2f}"]
        cells += ["" for _ in names] + [f"{np.mean(costs):.2f}"] + ["" for _ in places]
        cells.append(f"{np.sum([row.cpu or 0 for row in merges]):.0f}")
        lines.append(f"| mean of {len(merges)} merges (worst, sum) | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(
    seeds: Sequence[FitTable],
    only: str | None,
    max_new_tokens: int,
    *,
    print_only: bool,
    record: bool,
) -> None:
    """Measure what is missing of each training seed, and print what there is.

    Raises:
        ClickException: ``only`` is no combination of the family.
    """
    family = seeds[0].family
    combinations = family.chosen(only)
    for found in () if print_only else seeds:
        found.base_and_experts()
        for experts in combinations:
            found.kept(found.name(experts), partial(found.merged, experts, max_new_tokens))
    for found in seeds if record else ():
        found.record()
    rows = [row for found in seeds for row in found.rows()]
    click.echo(table(rows, family.skills) if rows else "nothing is measured yet")


def prompts_option(said: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """How many prompts of each skill a command takes."""
    least = click.IntRange(min=1)
    return click.option("--prompts", "n", type=least, default=N, show_default=True, help=said)


seeds_option = click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=int,
    default=(0,),
    show_default=True,
    help="Of the experts' training; may be given several times, for one table of all.",
)


def options(main: Callable[..., None]) -> Callable[..., None]:
    """The options of a family's command."""
    for add in (
        click.option(
            "--print",
            "print_only",
            is_flag=True,
            help="Only print what there is: measured here, else committed.",
        ),
        click.option(
            "--record",
            is_flag=True,
            help="Write what was measured here, without answers, to measured/, to be committed.",
        ),
        click.option(
            "--fit", "fit", default="", help="Further options of `mergekit-wp fit`, kept apart."
        ),
        prompts_option("Of each skill; results of other numbers are kept apart."),
        seeds_option,
        only_option,
    ):
        main = add(main)
    return main


def split_options(text: str) -> tuple[str, ...]:
    """Options as a shell splits them."""
    return tuple(shlex.split(text))
