"""A forecast in words: a table for a plan alone, a line before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mergekit_wp.costs.forecast import Forecast
from mergekit_wp.costs.work import Held, Work
from mergekit_wp.errors import option
from mergekit_wp.models.memory import GIB


def table(forecast: Forecast, spelt: Callable[[str], str]) -> str:
    """The whole plan.

    Args:
        forecast: of a command.
        spelt: makes one printable line of what names models and options.
    """
    costs, speeds = forecast.costs, forecast.speeds
    rows = [("stage", "FLOPs", "read", "written", "time here", "")]
    for stage in costs.stages:
        took = "done" if stage.done else duration(speeds.seconds(stage.work))
        rows.append((spelt(stage.name), *_counts(stage.work), took, spelt(stage.said)))
    rows.append(("in all", *_counts(costs.work), duration(forecast.seconds), ""))
    lines = [_aligned(rows), "", _memory(forecast), "", f"disk: {_disk(forecast)}"]
    lines += [spelt(costs.said)] if costs.said else []
    lines += [f"note: {spelt(note)}" for note in costs.notes]
    without = spelt(f"leave out {option('dry_run')} to begin")
    lines.append(f"nothing was computed or written; {without}")
    return "\n".join(lines)


def line(forecast: Forecast) -> str:
    """Before a run."""
    costs = forecast.costs
    held = sum(part.size for part in forecast.memory)
    memory = f"{amount(held)} of memory"
    if forecast.on_gpu:
        device = costs.held(on_device=True)
        memory = f"{amount(device)} on {forecast.device} and {amount(held - device)} of memory"
    said = [
        *([costs.said] if costs.said else []),
        f"needs about {memory}",
        f"reads {amount(costs.left.read)}",
    ]
    if costs.disk + costs.passing >= GIB:
        said.append(f"writes up to {amount(costs.disk + costs.passing)}")
    most = "at most " if any("at most" in stage.said for stage in costs.stages) else ""
    said.append(f"{most}about {duration(forecast.seconds)} here")
    return ", ".join(said)


def amount(size: float) -> str:
    """Bytes, in units of 1024."""
    for unit, factor in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if size >= factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 1000 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size / 1024:.3g} KiB"


def duration(seconds: float) -> str:
    """Seconds, in a unit that suits them."""
    for unit, factor in (("days", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= factor:
            one = {"days": 86_400.0, "h": 3600.0, "min": 60.0}[unit]
            return (
                f"{seconds / one:.2g} {unit}"
                if seconds < 10 * one
                else f"{seconds / one:.0f} {unit}"
            )
    if seconds < 0.1:
        return "under 0.1 s"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def flops(count: float) -> str:
    """FLOPs, in a unit that suits them."""
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.2g} M"


def _counts(work: Work) -> tuple[str, str, str]:
    counts = flops(work.flops) if work.flops else ""
    return (
        counts,
        amount(work.read) if work.read else "",
        amount(work.written) if work.written else "",
    )


def _memory(forecast: Forecast) -> str:
    """Peak memory by part, on the device and on the host."""
    both = forecast.memory
    if not forecast.on_gpu:
        return _places([("memory when it is fullest", both)])
    on = [part for part in both if part.on_device]
    off = [part for part in both if not part.on_device]
    return _places([(f"memory of {forecast.device} when it is fullest", on), ("main memory", off)])


def _places(places: Iterable[tuple[str, Sequence[Held]]]) -> str:
    rows = []
    for title, parts in places:
        rows.append((title, amount(sum(part.size for part in parts))))
        rows += [(f"  {part.name}", amount(part.size)) for part in parts if part.size]
    return _aligned(rows)


def _disk(forecast: Forecast) -> str:
    costs = forecast.costs
    passing = f", and up to {amount(costs.passing)} while it runs" if costs.passing else ""
    return f"{amount(costs.disk)} stay{passing}" if costs.disk else f"nothing stays{passing}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        last = len(row) - 1
        cells += [
            cell.ljust(widths[i]) if i == last and last > 1 else cell.rjust(widths[i])
            for i, cell in enumerate(row[1:], 1)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
