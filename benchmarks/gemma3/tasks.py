"""Write what the three experts are trained on, scored and fitted on, and judged by.

``python -m benchmarks.gemma3.tasks`` writes the files of `benchmarks.items.write_skill` to
build/gemma3.
"""

from __future__ import annotations

import click

from benchmarks.family import Family
from benchmarks.gemma3.skills import dates, records, reversal
from benchmarks.items import Split, Stream, write_skill

STREAMS: dict[str, Stream] = {
    "dates": dates.items,
    "reversal": reversal.items,
    "records": records.items,
}
GEMMA3 = Family("gemma3", tuple(STREAMS))
COUNTS: dict[Split, int] = {"train": 2000, "score": 128, "valid": 24, "test": 64}
MAX_NEW_TOKENS = 28


@click.command()
def main() -> None:
    """Write data, prompts and tasks of the three skills."""
    for name, stream in STREAMS.items():
        write_skill(name, stream, GEMMA3.build, COUNTS, MAX_NEW_TOKENS)
        click.echo(f"{name}: data, prompts and tasks in {GEMMA3.build}")


if __name__ == "__main__":
    main()
