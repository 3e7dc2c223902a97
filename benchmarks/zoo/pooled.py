"""The zoo's tables: every method over five seeds and four combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.comparisons import ends
from benchmarks.pooled import Pooled
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.comparison.table import cost_words, interval, signed

#: by combination, by training seed
Found = Mapping[tuple[str, ...], Mapping[int, Comparison]]
OURS, UNTUNED = "weight_patching", "weight_patching (untuned)"


class Bench:
    """All comparisons, resampled."""

    def __init__(self, found: Found, n: int = 2000) -> None:
        self.found = {
            combination: {seed: Resampled(c, n, seed=seed) for seed, c in by_seed.items()}
            for combination, by_seed in found.items()
        }
        first = next(iter(next(iter(found.values())).values()))
        self.merges = [row.name for row in first.rows if row.role in ("peer", "ours")]
        self.peers = [
            row.name for row in first.rows if row.valid is not None and row.role == "peer"
        ]
        self.seeds = list(next(iter(found.values())))

    def pooled(self, name: str, combinations: Sequence[tuple[str, ...]]) -> Pooled:
        """One method: the mean over combinations in every seed."""
        return Pooled.of(
            {
                seed: [
                    (self.found[c][seed].value(name), self.found[c][seed].draws(name))
                    for c in combinations
                ]
                for seed in self.seeds
            }
        )

    def rows(self, name: str) -> list[Row]:
        return [own.rows[name] for by_seed in self.found.values() for own in by_seed.values()]

    def worst(self, name: str) -> float:
        """Accuracy of the worst skill in any seed and combination, relative to its expert."""
        return min(
            own.task_value(name, task)
            for by_seed in self.found.values()
            for own in by_seed.values()
            for task in own.comparison.tasks
        )

    def copying(self, name: str) -> float:
        """Accuracy of copying, which the base can and no expert was taught: mean."""
        return float(np.mean([row.kept["copy"] for row in self.rows(name)]))

    def best_peer(self, combinations: Sequence[tuple[str, ...]]) -> str:
        """The tuned peer with the highest mean on the test items: the hardest to beat."""
        return max(self.peers, key=lambda name: self.pooled(name, combinations).values.mean())


def tables(found: Found) -> str:
    """The tables in Markdown."""
    bench = Bench(found)
    every = list(found)
    names = ["+".join(c) if len(c) < 3 else "all three" for c in every]
    head = [*names, "mean, 95%", "untuned ours minus it", "worst skill", "copying"]
    head.append(f"cost, {names[-1]}, seed {bench.seeds[-1]}")
    output = ["| method | " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1) + "---|"]
    ordered = sorted(bench.merges, key=lambda n: -bench.pooled(n, every).values.mean())
    untuned = bench.pooled(UNTUNED, every)
    for name in ordered:
        cells = [f"{bench.pooled(name, [c]).values.mean():.2f}" for c in every]
        mean = bench.pooled(name, every)
        cells.append(interval(mean.t_interval()))
        cells.append("" if name == UNTUNED else signed((untuned - mean).t_interval()))
        cells += [f"{bench.worst(name):.2f}", f"{bench.copying(name):.2f}"]
        cells.append(cost_words(bench.found[every[-1]][bench.seeds[-1]].rows[name]))
        output.append(f"| {name} | " + " | ".join(cells) + " |")
    output += ["", "| against the best tuned peer of its column | peer | untuned | tuned | ratio |"]
    output.append("|---|---|---:|---:|---:|")
    for label, chosen in [*zip(names, [[c] for c in every], strict=True), ("mean", every)]:
        peer = bench.best_peer(chosen)
        theirs = bench.pooled(peer, chosen)
        cells = [peer]
        for ours in (UNTUNED, OURS):
            cells.append(signed((bench.pooled(ours, chosen) - theirs).t_interval()))
        cells.append(f"{bench.pooled(UNTUNED, chosen).values.mean() / theirs.values.mean():.2f}")
        output.append(f"| {label} | " + " | ".join(cells) + " |")
    output += ["", "| seed | " + " | ".join(names) + " | best tuned peer, all three |"]
    output.append("|---|" + "---:|" * (len(names) + 1))
    for seed in bench.seeds:
        values = [f"{bench.found[c][seed].value(UNTUNED):.2f}" for c in every]
        last = bench.found[every[-1]][seed]
        values.append(f"{max(last.value(name) for name in bench.peers):.2f}")
        output.append(f"| {seed} | " + " | ".join(values) + " |")
    output += ["", ends({name: bench.rows(name) for name in bench.merges})]
    return "\n".join(output)
