"""A family's tables over all combinations, from its comparisons.

Intervals are paired bootstraps over test items; a skill's items are resampled alike in every
combination that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.family import Family
from mergekit_wp.comparison.reading import read_comparison
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import UNTUNED
from mergekit_wp.comparison.table import interval, signed
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

    def best_peer(self, chosen: Sequence[Resampled]) -> str:
        """The tuned peer with the highest mean on the test items: the hardest to beat."""
        return max(self.peers, key=lambda name: self.value(name, chosen))


def tables(bench: Bench, names: Sequence[str]) -> str:
    """The tables in Markdown."""
    every, untuned = bench.found, OURS + UNTUNED
    skills = list(dict.fromkeys(task for found in every for task in found.comparison.tasks))
    output = ["| method | " + " | ".join(names) + " | mean, 95% | untuned ours minus it |"]
    output.append("|---|" + "---:|" * (len(names) + 2))
    for name in sorted(bench.merges, key=lambda n: -bench.value(n, every)):
        cells = [f"{found.value(name):.2f}" for found in every]
        cells.append(interval(bench.mean(name, every)))
        same = name == untuned
        cells.append("" if same else signed(bench.difference(untuned, name, every)))
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


def show(family: Family) -> str:
    """The tables of a family's combinations."""
    folders = [family.folder / "compare" / "-".join(experts) for experts in family.combinations]
    return tables(Bench(folders), [" + ".join(experts) for experts in family.combinations])
