"""A family's tables over all combinations, from its comparisons.

Intervals are paired bootstraps over test items; a skill's items are resampled alike in every
combination that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.family import Family
from benchmarks.fit_table import FitTable, prompts_option, split_options
from mergekit_wp.comparison.reading import read_comparison
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import UNTUNED
from mergekit_wp.comparison.table import cost_words, interval, signed
from mergekit_wp.statistics import Array, Estimate, percentiles

OURS = "weight_patching"


class Bench:
    """The comparisons of all combinations, resampled."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.found = [Resampled(read_comparison(folder)) for folder in folders]
        rows = self.found[0].rows.values()
        self.merges = [row.name for row in rows if row.role in ("peer", "ours")]
        self.peers = [r.name for r in rows if r.role == "peer" and r.valid is not None]

    def value(self, name: str, chosen: Sequence[Resampled]) -> float:
        """Mean over combinations."""
        return float(np.mean([found.value(name) for found in chosen]))

    def draws(self, name: str, chosen: Sequence[Resampled]) -> Array:
        """Resamples of `value`."""
        return np.asarray(np.mean([found.draws(name) for found in chosen], axis=0))

    def mean(self, name: str, chosen: Sequence[Resampled]) -> Estimate:
        """`value` with its interval."""
        return percentiles(self.value(name, chosen), self.draws(name, chosen))

    def difference(self, a: str, b: str, chosen: Sequence[Resampled]) -> Estimate:
        """Row a minus row b, paired."""
        value = self.value(a, chosen) - self.value(b, chosen)
        return percentiles(value, self.draws(a, chosen) - self.draws(b, chosen))

    def perplexity(self, name: str) -> float | None:
        """Of plain text, times the base's: geometric mean over combinations; None unmeasured."""
        found = [
            own.rows[name].perplexity(base)
            for own in self.found
            if (base := own.comparison.base) is not None
        ]
        values = [value for value in found if value is not None]
        return float(np.exp(np.mean(np.log(values)))) if values else None

    def worst_loss(self, name: str) -> str:
        """The most that a combination lost of what the base can, and of what."""
        found = [
            (loss, task)
            for own in self.found
            if (base := own.comparison.base) is not None
            for task, loss in own.rows[name].losses(base).items()
        ]
        return "{:.2f} of {}".format(*max(found)) if found else ""

    def equal(self, name: str) -> Estimate | None:
        """`mean` at equal perplexity; None where a combination has no such parameters."""
        rows = [own.comparison.equal.get(name) for own in self.found]
        chosen = [(own, row.name) for own, row in zip(self.found, rows, strict=True) if row]
        if len(chosen) < len(rows):
            return None
        value = float(np.mean([own.value(row) for own, row in chosen]))
        draws = np.mean([own.draws(row) for own, row in chosen], axis=0)
        return percentiles(value, np.asarray(draws))

    def best_peer(self, chosen: Sequence[Resampled]) -> str:
        """The tuned peer with the highest mean on the test items: the hardest to beat."""
        return max(self.peers, key=lambda name: self.value(name, chosen))


def tables(bench: Bench, names: Sequence[str]) -> str:
    """The tables in Markdown."""
    every, untuned = bench.found, OURS + UNTUNED
    skills = list(dict.fromkeys(task for found in every for task in found.comparison.tasks))
    output = [
        "| method | " + " | ".join(names) + " | mean, 95% | untuned ours minus it "
        "| perplexity, x base | mean at equal perplexity | worst loss | cost of the last |"
    ]
    output.append("|---|" + "---:|" * (len(names) + 4) + "---|---|")
    for name in sorted(bench.merges, key=lambda n: -bench.value(n, every)):
        cells = [f"{found.value(name):.2f}" for found in every]
        cells.append(interval(bench.mean(name, every)))
        same = name == untuned
        cells.append("" if same else signed(bench.difference(untuned, name, every)))
        cost = bench.perplexity(name)
        cells.append("" if cost is None else f"{cost:.2f}")
        equal = bench.equal(name)
        cells.append("none" if equal is None else interval(equal))
        cells.append(bench.worst_loss(name))
        cells.append(cost_words(every[-1].rows[name]))
        output.append(f"| {name} | " + " | ".join(cells) + " |")
    output += ["", "| against the best tuned peer of its column | peer | untuned | tuned |"]
    output.append("|---|---|---:|---:|")
    for label, chosen in [*zip(names, [[f] for f in every], strict=True), ("mean", every)]:
        peer = bench.best_peer(chosen)
        cells = [signed(bench.difference(ours, peer, chosen)) for ours in (untuned, OURS)]
        output.append(f"| {label} | {peer} | " + " | ".join(cells) + " |")
    output += ["", "| accuracy | combination | " + " | ".join(skills) + " |"]
    output.append("|---|---|" + "---:|" * len(skills))
    for label, found in zip(names, every, strict=True):
        shown = ["base", *(r for r in found.rows if r.startswith("expert")), untuned, OURS]
        for name in [*shown, bench.best_peer([found])]:
            row = found.rows[name]
            cells = [
                f"{np.mean(row.scores[task]):.2f}" if task in row.scores else "" for task in skills
            ]
            output.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(output)


def show(family: Family, fit: str, n: int) -> str:
    """The tables of the combinations that were compared.

    Args:
        family: whose.
        fit: further options that it was fitted by.
        n: prompts of each skill.

    Raises:
        ClickException: none was.
    """
    name = FitTable(family, split_options(fit), n=n).name
    folders = {
        " + ".join(experts): family.folder / "compare" / name(experts)
        for experts in family.combinations
    }
    made = {
        label: folder for label, folder in folders.items() if (folder / "summary.json").exists()
    }
    if not made:
        raise click.ClickException(f"no comparison of {family.name} was made; run its bench first")
    return tables(Bench(list(made.values())), list(made))


def options(main: click.decorators.FC) -> click.decorators.FC:
    """The options of a family's command."""
    for add in (
        click.option("--fit", default="", help="Further options of the fits, as of `bench`."),
        prompts_option("As of `bench`."),
        click.option("--seed", default=0, show_default=True, help="Of the experts' training."),
    ):
        main = add(main)
    return main
