"""Checkpoints, prompts and reference values: what every contestant of the benchmark is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.components import Component
from benchmarks.files import REPO
from benchmarks.smollm2.paths import BUILD
from mergekit_wp.components import Partition
from mergekit_wp.criteria import Criteria
from mergekit_wp.models.resident import ResidentModel
from mergekit_wp.prompts import Sample, read_prompts
from mergekit_wp.runs.progress import BarProgress
from mergekit_wp.runs.recordings import Recordings
from mergekit_wp.runs.references import References, measure_references
from mergekit_wp.runs.request import DTYPES, RunRequest
from mergekit_wp.runs.run import Run
from mergekit_wp.terms import Kind

ZOO = REPO / "benchmarks" / "zoo" / "checkpoints"
CRITERIA: Criteria = ("kl", "anchor")


@dataclass(frozen=True)
class Case:
    """A pair of checkpoints with prompts that have given responses."""

    name: str
    base: Path
    expert: Path
    prompts: Path


def cases(smollm2: Path = BUILD) -> dict[str, Case]:
    """The cases by name."""
    return {
        "zoo": Case("zoo", ZOO / "base", ZOO / "math", ZOO / "prompts" / "math.jsonl"),
        "smollm2": Case(
            "smollm2",
            smollm2 / "base",
            smollm2 / "experts" / "math",
            smollm2 / "prompts" / "math.jsonl",
        ),
    }


@dataclass(frozen=True)
class Inputs:
    """An opened case.

    Attributes:
        resident: the model in memory, at the base.
        references: prompts, targets and reference values by ``kl`` and ``anchor``.
        batch_size: sequences per forward that the engine chose.
    """

    case: Case
    resident: ResidentModel
    references: References
    batch_size: int

    @property
    def partition(self) -> Partition:
        """The components."""
        return self.resident.pair.partition

    @property
    def tokens(self) -> int:
        """Input tokens of all prompts, without padding."""
        return sum(
            int(batch.cols[batch.rows == row].max()) + 1
            for batch in self.references.batches
            for row in range(batch.size)
        )

    def recordings(self, criteria: Criteria) -> Recordings:
        """Of a fresh sweep: nothing is recorded yet."""
        return Recordings(self.resident, self.references, criteria)


def open_case(case: Case, n_prompts: int, dtype: torch.dtype, device: str) -> Inputs:
    """Open a case, with the anchor at 60% of the depth."""
    progress = BarProgress()
    name = next(name for name, known in DTYPES.items() if known == dtype)
    request = RunRequest.model_validate({"dtype": name, "device": device})
    prompts = read_prompts(case.prompts, n_prompts)
    run = Run.open(request, str(case.base), str(case.expert), prompts, progress)
    texts, resident = run.texts, run.load()
    samples = [Sample(tuple(p), tuple(texts.responses[i])) for i, p in enumerate(texts.prompts)]
    size = run.batch_size(samples)
    layer = round(0.6 * run.pair.partition.dims.n_layers) - 1
    references = measure_references(resident, samples, CRITERIA, size, anchor_layer=layer)
    progress.close()
    return Inputs(case, resident, references, size)


def heads_and_neurons(partition: Partition, neurons: int, seed: int = 0) -> list[Component]:
    """All heads, and a uniform sample of neurons in the order of the layers."""
    dims = partition.dims
    total = dims.n_layers * dims.n_neurons
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = sorted(order[:neurons].tolist())
    kinds: dict[Kind, list[int]] = {
        "head": list(range(dims.n_layers * dims.n_heads)),
        "neuron": chosen,
    }
    return [
        Component(kind, i // dims.count(kind), i % dims.count(kind), f"{kind} {i}")
        for kind, flat in kinds.items()
        for i in flat
    ]
