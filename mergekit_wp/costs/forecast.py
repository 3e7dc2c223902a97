"""What a command that is about to begin will take, and how long that is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_wp.comparison.compare import CompareOpened
from mergekit_wp.costs import calibration
from mergekit_wp.costs.calibration import Speeds, Timed, calibrate, of_reading, roughly
from mergekit_wp.costs.comparison import comparing
from mergekit_wp.costs.joint import fit
from mergekit_wp.costs.mechanism import anchoring, tracing, verifying
from mergekit_wp.costs.merging import merging
from mergekit_wp.costs.model_size import ModelSize
from mergekit_wp.costs.passes import TextBatch, Texts
from mergekit_wp.costs.scoring import batch_size, scoring
from mergekit_wp.costs.work import Costs, Held
from mergekit_wp.joint.fit import FitOpened
from mergekit_wp.mechanism.anchors import AnchorOpened
from mergekit_wp.mechanism.circuit import TraceOpened
from mergekit_wp.mechanism.verify import VerifyOpened
from mergekit_wp.merging.merge import MergeOpened
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.models.memory import resident_memory
from mergekit_wp.runs.request import DTYPES
from mergekit_wp.runs.run import Opened
from mergekit_wp.scoring.score import ScoreOpened

#: seconds of a run, by the quickest of machines, from which on a forecast is worth its time
WORTH = 30.0
#: rows and tokens that stand for a comparison's, which has none of its own
_USUAL = TextBatch(8, 256, 8)

_COUNTED: dict[type, Callable[[Any], Costs]] = {
    ScoreOpened: scoring,
    FitOpened: fit,
    VerifyOpened: verifying,
    TraceOpened: tracing,
    AnchorOpened: anchoring,
    CompareOpened: comparing,
    MergeOpened: merging,
}


@dataclass(frozen=True)
class Forecast:
    """What a command takes, and at what speed.

    Attributes:
        costs: counted.
        speeds: of this machine.
        device: that computes.
        libraries: bytes that Python and its libraries had taken when it was made.
    """

    costs: Costs
    speeds: Speeds
    device: str
    libraries: float

    @property
    def seconds(self) -> float:
        """Of what is not over yet."""
        return self.speeds.seconds(self.costs.left)

    @property
    def memory(self) -> tuple[Held, ...]:
        """What is held when memory is fullest, with Python and its libraries."""
        return (*self.costs.memory, Held("Python and its libraries", self.libraries, False))

    @property
    def on_gpu(self) -> bool:
        """Whether the device that computes has memory of its own."""
        return torch.device(self.device).type != "cpu"


def counted(opened: object) -> Costs:
    """What a command takes, by counting alone.

    Args:
        opened: what it has read and checked, as `Progress.plan` is told.
    """
    return _COUNTED[type(opened)](opened)


def forecast(opened: object, costs: Costs, budget: float = calibration.LONGEST) -> Forecast:
    """Count, and time one of each kind of work.

    Args:
        opened: what the command has read and checked.
        costs: of the whole command.
        budget: seconds that the timing may take, about.
    """
    libraries = float(resident_memory())
    if isinstance(opened, MergeOpened):
        return Forecast(costs, of_reading(opened.file, budget), "cpu", libraries)
    timed = _timed(opened)
    return Forecast(costs, calibrate(timed, budget), timed.device, libraries)


def worth_a_line(opened: object, costs: Costs) -> float | None:
    """Seconds that timing may take before a real run; None where the run is too short for a line.

    No more than a fiftieth of what the run takes on a machine quicker than this one.
    """
    device, layers = "cpu", 0
    if not isinstance(opened, MergeOpened):
        timed = _timed(opened)
        device, layers = timed.device, timed.size.layers
    least = roughly(layers, costs.left, device)
    return None if least < WORTH else min(calibration.LONGEST, calibration.SHARE * least)


def _timed(opened: object) -> Timed:
    """What is to be timed: the model at the rows and tokens that the command runs."""
    if isinstance(opened, CompareOpened):
        plan, base = opened.plan, Checkpoint(opened.plan.base)
        return Timed(base, ModelSize.of_checkpoint(base), plan.eval_dtype, plan.device, _USUAL)
    assert isinstance(opened, Opened)
    request, run = opened.request, opened.runs[0]
    texts = Texts.of(run)
    if isinstance(opened, FitOpened):
        together = opened.a_step
    elif isinstance(opened, ScoreOpened):
        together = batch_size(run, texts)
    else:
        together = run.batch_size(texts.samples)
    batches = texts.batches(together)
    typical = sorted(batches, key=lambda batch: batch.tokens)[len(batches) // 2]
    size = ModelSize.of(run.pair.partition.dims, run.pair.partition.shapes, run.pair.base.config)
    rows = min(request.batch_size or 32, max(1, len(texts.asked)))
    base = run.pair.base
    return Timed(base, size, DTYPES[request.dtype], request.device, typical, rows)
