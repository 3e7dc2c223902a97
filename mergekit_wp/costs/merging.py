"""What a merge takes."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_wp.costs.model_size import PairSize
from mergekit_wp.costs.passes import MIX
from mergekit_wp.costs.work import Costs, Held, Stage, Work
from mergekit_wp.merging.merge import MergeOpened


def merged(stored: Sequence[float], numbers: float, written: float) -> Work:
    """One merge by mergekit.

    Args:
        stored: bytes of each model that is read.
        numbers: of the merge.
        written: bytes of it.
    """
    return Work(read=sum(stored), passed=MIX * numbers * len(stored), written=written)


def merging(opened: MergeOpened) -> Costs:
    """The whole of `merge` by a recipe."""
    numbers, largest = sum(opened.parts), max(opened.parts, default=0)
    return _costs([float(size) for size in opened.stored], numbers, largest, opened.width)


def after_fit(pairs: Sequence[PairSize]) -> Costs:
    """The merge that follows a fit of the same experts, as the base is stored."""
    size = pairs[0].size
    width = round(pairs[0].base / size.parameters)
    stored = [pairs[0].base, *(pair.expert for pair in pairs)]
    return _costs(stored, size.parameters, max(size.head, size.largest), width)


def _costs(stored: Sequence[float], numbers: float, largest: float, width: int) -> Costs:
    written = float(numbers * width)
    # a tensor of every model in float32, and the shard that is being filled (mergekit's: 5 GB)
    held = (
        Held("a tensor of every model", 4.0 * largest * (len(stored) + 1), on_device=False),
        Held("a shard that is written", min(written, 5e9), on_device=False),
    )
    stage = Stage("merging", merged(stored, numbers, written), f"{len(stored)} models")
    return Costs((stage,), held, written)
