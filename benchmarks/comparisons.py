"""A family's tables over all combinations and training seeds, from its comparisons.

Intervals are paired bootstraps over test items, of the trainings as they are; a skill's items are
resampled alike in every comparison that has it. Of differences between methods there is one over
training seeds as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from pydantic import TypeAdapter

from benchmarks.family import Family, only_option
from benchmarks.fit_table import FitTable, prompts_option, seeds_option, split_options
from benchmarks.pooled import Pooled
from mergekit_wp.comparison.reading import read_comparison
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import UNTUNED, Comparison, Row
from mergekit_wp.comparison.table import cost_words, interval, none_tried, signed
from mergekit_wp.statistics import Estimate, percentiles

OURS = "weight_patching"
#: by training seed, by combination
Found = Mapping[int, Mapping[str, Comparison]]
_FILE = TypeAdapter(Comparison)


class Bench:
    """Comparisons, resampled: of one training seed, or of the same combinations in several."""

    def __init__(self, found: Found) -> None:
        self.found = {
            seed: {label: Resampled(comparison) for label, comparison in by_label.items()}
            for seed, by_label in found.items()
        }
        self.every = [own for by_label in self.found.values() for own in by_label.values()]
        self.labels = list(next(iter(self.found.values())))
        rows = self.every[0].rows.values()
        self.merges = [
            row.name
            for row in rows
            if row.role in ("peer", "ours") and all(row.name in own.rows for own in self.every)
        ]
        tuned = [r.name for r in rows if r.role == "peer" and r.valid is not None]
        self.peers = [name for name in self.merges if name in tuned]

    def of(self, seed: int) -> Bench:
        """One training seed alone."""
        return Bench({seed: {c: own.comparison for c, own in self.found[seed].items()}})

    def pooled(self, name: str, labels: Sequence[str]) -> Pooled:
        """A method's mean over combinations, by training seed."""
        return Pooled.of(
            {
                seed: [(by_label[c].value(name), by_label[c].draws(name)) for c in labels]
                for seed, by_label in self.found.items()
            }
        )

    def mean(self, name: str, labels: Sequence[str]) -> Estimate:
        """Over combinations and training seeds."""
        return _over_items(self.pooled(name, labels))

    def capped(self, name: str) -> float:
        """The mean with no skill counted above its expert."""
        parts = [own.task_value(name, t) for own in self.every for t in own.comparison.tasks]
        return float(np.minimum(parts, 1).mean())

    def difference(self, a: str, b: str, labels: Sequence[str]) -> Estimate:
        """Row a minus row b, paired."""
        return _over_items(self.pooled(a, labels) - self.pooled(b, labels))

    def over_trainings(self, a: str, b: str, labels: Sequence[str]) -> Estimate:
        """`difference` with an interval for other trainings of the experts."""
        return (self.pooled(a, labels) - self.pooled(b, labels)).over_both()

    def worst(self, name: str) -> float:
        """The worst skill of all comparisons, relative to its expert."""
        return min(
            own.task_value(name, task) for own in self.every for task in own.comparison.tasks
        )

    def perplexity(self, name: str) -> float | None:
        """Of plain text, times the base's: geometric mean of all; None unmeasured."""
        found = [
            own.rows[name].perplexity(base)
            for own in self.every
            if (base := own.comparison.base) is not None
        ]
        values = [value for value in found if value is not None]
        return float(np.exp(np.mean(np.log(values)))) if values else None

    def worst_loss(self, name: str) -> str:
        """The most that a merge lost of what the base can, and of what."""
        found = [
            (loss, task)
            for own in self.every
            if (base := own.comparison.base) is not None
            for task, loss in own.rows[name].losses(base).items()
        ]
        return "{:.2f} of {}".format(*max(found)) if found else ""

    def equal(self, name: str) -> Estimate | None:
        """`mean` at equal perplexity; None where a comparison has no such parameters."""
        parts: dict[int, list[tuple[float, np.ndarray]]] = {}
        for seed, by_label in self.found.items():
            for own in by_label.values():
                row = own.comparison.equal.get(name)
                if row is None:
                    return None
                parts.setdefault(seed, []).append((own.value(row.name), own.draws(row.name)))
        return _over_items(Pooled.of(parts))

    def best_peer(self, labels: Sequence[str]) -> str:
        """The tuned peer with the highest mean on the test items: the hardest to beat."""
        return max(self.peers, key=lambda name: self.pooled(name, labels).values.mean())


def _over_items(pooled: Pooled) -> Estimate:
    return percentiles(float(pooled.values.mean()), pooled.draws.mean(0))


def tables(bench: Bench) -> str:
    """The tables in Markdown; a column for each combination, of several training seeds for each."""
    labels, untuned = bench.labels, OURS + UNTUNED
    several = len(bench.found) > 1
    columns = [f"seed {seed}" for seed in bench.found] if several else labels
    head = ["method", *columns, "mean, 95%", "skills capped at 1", "untuned ours minus it"]
    head += [*(["over trainings, too"] if several else []), "worst skill", "perplexity, x base"]
    head += ["mean at equal perplexity", "worst loss", "cost of the last"]
    output = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 3) + "---|---|"]
    if several:
        output.insert(0, f"Means over: {', '.join(labels)}.\n")
    for name in sorted(bench.merges, key=lambda n: -bench.mean(n, labels).value):
        if several:
            values = bench.pooled(name, labels).values
        else:
            values = np.array([bench.mean(name, [label]).value for label in labels])
        cells = [f"{value:.2f}" for value in values]
        cells += [interval(bench.mean(name, labels)), f"{bench.capped(name):.2f}"]
        same = name == untuned
        cells.append("" if same else signed(bench.difference(untuned, name, labels)))
        if several:
            cells.append("" if same else signed(bench.over_trainings(untuned, name, labels)))
        cells.append(f"{bench.worst(name):.2f}")
        cost = bench.perplexity(name)
        cells.append("" if cost is None else f"{cost:.2f}")
        equal = bench.equal(name)
        tried = [own.rows[name] for own in bench.every]
        cells.append(none_tried(tried) if equal is None else interval(equal))
        cells.append(bench.worst_loss(name))
        cells.append(cost_words(bench.every[-1].rows[name]))
        output.append(f"| {name} | " + " | ".join(cells) + " |")
    head = ["against the best tuned peer", "peer", "untuned", "tuned"]
    head += ["untuned, over trainings, too", "tuned, over trainings, too"] if several else []
    output += ["", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    parts = [bench.of(seed) for seed in bench.found] if several else []
    for heading, part, chosen in [
        *((f"seed {next(iter(part.found))}", part, labels) for part in parts),
        *((label, bench, [label]) for label in labels),
        *([("mean", bench, labels)] if len(labels) > 1 else []),
    ]:
        peer = part.best_peer(chosen)
        cells = [signed(part.difference(own, peer, chosen)) for own in (untuned, OURS)]
        for own in (untuned, OURS) if several else ():
            alone = len(part.found) == 1
            cells.append("" if alone else signed(part.over_trainings(own, peer, chosen)))
        output.append(f"| {heading} | {peer} | " + " | ".join(cells) + " |")
    chosen_at = ends({name: [own.rows[name] for own in bench.every] for name in bench.merges})
    return "\n".join([*output, "", chosen_at, *elsewhere(bench), "", *_accuracies(bench)])


def elsewhere(bench: Bench) -> list[str]:
    """What the table leaves out: methods that were run in some of its comparisons only."""
    found: dict[str, list[str]] = {}
    for seed, by_label in bench.found.items():
        for label, own in by_label.items():
            place = label if len(bench.found) == 1 else f"{label}, seed {seed}"
            for name, row in own.rows.items():
                if row.role == "peer" and name not in bench.merges:
                    mean = bench.of(seed).mean(name, [label])
                    found.setdefault(name, []).append(f"{place}: {interval(mean)}")
    told = "; ".join(f"{name} ({', '.join(places)})" for name, places in found.items())
    return ["", f"Run in some comparisons only, and not in the table: {told}."] if told else []


def ends(of_methods: Mapping[str, Sequence[Row]]) -> str:
    """Which methods were chosen at an end of what was tried, and how often, in one sentence."""
    found = []
    for name, rows in of_methods.items():
        counts = Counter(f"{key} {row.setting[key]:g}" for row in rows for key in row.at_an_end)
        found += [f"{name} ({what}, {n} of {len(rows)})" for what, n in counts.items()]
    said = f"{', '.join(found)}." if found else "none."
    return f"Chosen at an end of what was tried, so that better may lie beyond it: {said}"


def _accuracies(bench: Bench) -> list[str]:
    """Right answers of base, experts, ours and each combination's best peer."""
    skills = list(dict.fromkeys(task for own in bench.every for task in own.comparison.tasks))
    output = ["| accuracy | combination | " + " | ".join(skills) + " |"]
    output.append("|---|---|" + "---:|" * len(skills))
    for seed, by_label in bench.found.items():
        for label, own in by_label.items():
            shown = ["base", *(r for r in own.rows if r.startswith("expert")), OURS + UNTUNED, OURS]
            place = label if len(bench.found) == 1 else f"{label}, seed {seed}"
            for name in [*shown, bench.best_peer([label])]:
                row = own.rows[name]
                cells = [
                    f"{np.mean(row.scores[task]):.2f}" if task in row.scores else ""
                    for task in skills
                ]
                output.append(f"| {name} | {place} | " + " | ".join(cells) + " |")
    return output


def commit(comparison: Comparison, path: Path) -> None:
    """Write a comparison item by item, without answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_FILE.dump_json(comparison) + b"\n")


def read_committed(path: Path) -> Comparison:
    """What `commit` wrote."""
    return _FILE.validate_json(path.read_bytes())


def find(
    table: FitTable, only: str | None = None, *, record: bool = False
) -> dict[str, Comparison]:
    """The comparisons of one training seed, by combination: made here, else committed.

    Args:
        table: its fits.
        only: this one alone, such as A-B.
        record: write those that were made here to ``measured/``.

    Raises:
        ClickException: ``only`` is no combination of the family.
    """
    found = {}
    for experts in table.family.chosen(only):
        name = table.name(experts)
        folder, committed = table.family.folder / "compare" / name, _committed(table, name)
        if (folder / "summary.json").exists():
            comparison = read_comparison(folder)
            if record:
                commit(comparison, committed)
        elif committed.exists():
            comparison = read_committed(committed)
        else:
            continue
        found[" + ".join(experts)] = comparison
    return found


def _committed(table: FitTable, name: str) -> Path:
    return table.committed / "compare" / f"{name}.json"


def show(
    family: Family,
    seeds: Sequence[int],
    fits: Sequence[str],
    n: int,
    only: str | None = None,
    *,
    record: bool = False,
) -> str:
    """The tables of the combinations that were compared in every training seed.

    Args:
        family: whose.
        seeds: of the experts' training.
        fits: further options that it was fitted by, of all seeds or of each.
        n: prompts of each skill.
        only: see `find`.
        record: see `find`.

    Raises:
        ClickException: none was; ``fits`` are neither one nor as many as the seeds.
    """
    if len(fits) not in (1, len(seeds)):
        raise click.ClickException(f"--fit is given {len(fits)} times for {len(seeds)} seeds")
    found = {
        seed: find(
            FitTable(replace(family, seed=seed), split_options(fit), n=n), only, record=record
        )
        for seed, fit in zip(seeds, fits if len(fits) > 1 else [*fits] * len(seeds), strict=True)
    }
    labels = [c for c in found[seeds[0]] if all(c in by_label for by_label in found.values())]
    if not labels:
        raise click.ClickException(
            f"no comparison of {family.name} was made in {'each' if len(seeds) > 1 else 'the'} "
            "training seed; run its bench first"
        )
    return tables(Bench({s: {c: by_label[c] for c in labels} for s, by_label in found.items()}))


def options(main: click.decorators.FC) -> click.decorators.FC:
    """The options of a family's command."""
    for add in (
        click.option(
            "--fit",
            "fits",
            multiple=True,
            default=("",),
            help="Further options of the fits, as of `bench`; one for all seeds, or one for each.",
        ),
        prompts_option("As of `bench`."),
        click.option(
            "--record",
            is_flag=True,
            help="Write what was compared here, without answers, to measured/, to be committed.",
        ),
        seeds_option,
        only_option,
    ):
        main = add(main)
    return main
