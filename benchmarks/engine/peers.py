"""The engine against the tools people use, on the same prompts and by the same criterion.

    python -m benchmarks.engine.peers --case smollm2 --n-prompts 4 --sample 15
    python -m benchmarks.engine.peers --case zoo --out /tmp/peers

Exact activation patches of all heads, exact swaps of their weights, and attribution patches of all
heads and neurons. Every contestant runs in a process of its own, turn about, and is kept as soon as
it is done, so that a command that was stopped goes on where it was. Where values differ, no table
is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.engine import ours
from benchmarks.engine.inputs import Inputs, cases, heads_and_neurons, open_case
from benchmarks.engine.measure import Spent
from benchmarks.engine.peer_task import REPEATS, Task
from benchmarks.files import REPO
from benchmarks.smollm2.paths import BUILD
from mergekit_wp.models.memory import GIB, peak_memory
from mergekit_wp.terms import Estimand

OURS = "mergekit-wp"
#: the largest difference of a gain from ours
TOLERANCE = 1e-4
PACKAGES = ("transformer-lens", "nnsight")
SWEEPS = {
    "activations": "exact activation patches of all heads",
    "weights": "exact weight swaps of all heads",
    "attribution": "attribution patches of all heads and neurons",
}
#: who takes part in which sweep; peers by the module that has a function of the sweep's name
PEERS = {
    "plain PyTorch": ("by_hooks", ("activations", "weights")),
    "TransformerLens": ("by_transformer_lens", ("activations", "attribution")),
    "nnsight": ("by_nnsight", ("activations", "weights", "attribution")),
}


@dataclass(frozen=True)
class Contest:
    """One contestant's run of one sweep.

    Attributes:
        wall, cpu: seconds, all heads counted.
        peak: bytes that the process has had at once.
        gains: by kind, of the heads that the peers patch, or of all components.
    """

    wall: float
    cpu: float
    peak: int
    gains: dict[str, list[float]]

    def difference(self, other: Contest) -> float:
        """The largest between two contestants' gains; not a number where any is none."""
        between = [
            a - b
            for kind, gains in self.gains.items()
            for a, b in zip(gains, other.gains[kind], strict=True)
        ]
        return float(torch.tensor(between, dtype=torch.float64).abs().max())


def contestants(sweep: str) -> list[str]:
    """Who takes part, ours first."""
    return [OURS, *(name for name, (_, sweeps) in PEERS.items() if sweep in sweeps)]


def contest(sweep: str, contestant: str, inputs: Inputs, sample: int | None) -> Contest:
    """One contestant's run in this process."""
    task, spent = Task.of(inputs, sample), Spent()
    if contestant == OURS:
        found = by_engine(sweep, inputs, task, spent)
    else:
        inputs.resident.release()  # peers open models of their own
        module = import_module(f"benchmarks.engine.{PEERS[contestant][0]}")
        found = getattr(module, sweep)(task, spent)
    gains = {kind: value.flatten().tolist() for kind, value in found.items()}
    return Contest(spent.wall, spent.cpu, peak_memory(), gains)


def by_engine(sweep: str, inputs: Inputs, task: Task, spent: Spent) -> dict[str, torch.Tensor]:
    """Ours: always of all heads, of which those that the peers patch are compared."""
    if sweep == "attribution":
        kinds = ("head", "neuron")
        found = spent.on(
            lambda: ours.first_order(inputs, ("kl",), "activation_gain", kinds), repeats=REPEATS
        )
        return {kind: found[f"kl/{kind}"] for kind in kinds}
    estimand: Estimand = "gain" if sweep == "weights" else "activation_gain"
    heads = heads_and_neurons(inputs.partition, 0)
    gains = spent.on(lambda: ours.exact(inputs, heads, ("kl",), estimand))["kl"]
    places = [layer * task.dims.n_heads + head for layer, head in task.heads]
    return {"head": gains[places]}


def in_a_process(sweep: str, contestant: str, options: argparse.Namespace) -> Contest:
    """One run, with what the machine allows in threads."""
    arguments = ["--run", sweep, contestant, "--case", options.case]
    arguments += ["--smollm2", str(options.smollm2), "--n-prompts", str(options.n_prompts)]
    arguments += [] if options.sample is None else ["--sample", str(options.sample)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.peers", *arguments],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{contestant} did not finish the {SWEEPS[sweep]}; see above")
    return Contest(**json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[tuple[str, str, int], Contest], repeats: int) -> str:
    """As Markdown: medians over the repeats, ratios to ours of the same repeat.

    Raises:
        SystemExit: a contestant's gains are not ours.
    """
    head = "| sweep | by | wall | CPU | peak memory | wall / ours | CPU / ours | memory / ours |"
    lines = [f"{head} largest difference |", "|---|---|" + "---:|" * 7]
    for sweep, words in SWEEPS.items():
        for name in contestants(sweep):
            pairs = [(found[sweep, name, i], found[sweep, OURS, i]) for i in range(repeats)]
            differences = [theirs.difference(own) for theirs, own in pairs]
            if not all(difference <= TOLERANCE for difference in differences):
                raise SystemExit(
                    f"{words}: gains by {name} differ from ours by {differences}, and more than "
                    f"{TOLERANCE} is not the same measurement; no times are compared"
                )
            cells = [
                f"{median(theirs.wall for theirs, _ in pairs):.3g} s",
                f"{median(theirs.cpu for theirs, _ in pairs):.3g} s",
                f"{median(theirs.peak for theirs, _ in pairs) / GIB:.2f} GiB",
                *(
                    _ratios([getattr(theirs, what) / getattr(own, what) for theirs, own in pairs])
                    for what in ("wall", "cpu", "peak")
                ),
                f"{max(differences):.1g}",
            ]
            if name == OURS:
                cells[3:] = [""] * 4
            lines.append(f"| {words} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(ratios: Sequence[float]) -> str:
    """The median, and where they lie."""
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def versions() -> str:
    """Of what the peers need, one after the other.

    Raises:
        SystemExit: one is not installed.
    """
    found = []
    for package in ("torch", "transformers", *PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise SystemExit(
                f"{package} is not installed; pip install -e '.[peers]' brings the peers"
            ) from None
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*cases()], default="smollm2")
    parser.add_argument("--smollm2", type=Path, default=BUILD, help="folder of its checkpoints")
    parser.add_argument("--n-prompts", type=int, default=4)
    parser.add_argument("--sample", type=int, help="peers patch only so many heads; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=BUILD.parent / "engine" / "peers")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for option in ("sample", "repeats", "n_prompts"):
        if (value := getattr(options, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} needs at least one")
    if options.run is not None:
        case = cases(options.smollm2)[options.case]
        inputs = open_case(case, options.n_prompts, torch.float32, "cpu")
        print(json.dumps(asdict(contest(*options.run, inputs, options.sample))))
        return
    said = versions()
    threads = torch.get_num_threads()
    kept = f"{options.case}-{options.n_prompts}-{options.sample or 'all'}-{threads}"
    folder = options.out / kept
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, int], Contest] = {}
    for number in range(options.repeats):
        for sweep in SWEEPS:
            for name in contestants(sweep):  # turn about: the machine may be busier later
                path = folder / f"{sweep}-{name.replace(' ', '-')}-{number}.json"
                if not path.exists():
                    one = in_a_process(sweep, name, options)
                    partial = path.with_suffix(".partial")
                    partial.write_text(json.dumps(asdict(one)))
                    partial.replace(path)
                found[sweep, name, number] = Contest(**json.loads(path.read_text()))
    print(f"{options.case}, {threads} threads; {said}\n\n{table(found, options.repeats)}")


if __name__ == "__main__":
    main()
