"""How often checkpoints answer in capitals, when asked to and when not, on unseen prompts.

Greedy answers, rates with 95% Wilson intervals, and an exact paired comparison (McNemar) of every
folder with the first one on the same prompts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from scipy.stats import binomtest

from benchmarks.files import read_jsonl
from benchmarks.smollm2.generate import generate
from benchmarks.smollm2.paths import PROMPTS
from mergekit_wp.statistics import wilson
from mergekit_wp.tasks.ifeval import follows

CAPITALS = "change_case:english_capital"


@dataclass(frozen=True)
class Outcome:
    """One folder's responses to one set of requests, and which of them are all capitals."""

    model: str
    asked: bool
    capitals: list[bool]
    responses: list[str]

    @property
    def rate(self) -> float:
        """Fraction of responses all in capitals."""
        return sum(self.capitals) / len(self.capitals)

    def row(self, first: Outcome) -> str:
        """One line of the table; ``first`` is the outcome to compare with."""
        n, k = len(self.capitals), sum(self.capitals)
        interval = wilson(self.capitals)
        letters = sum(capital_fraction(text) for text in self.responses) / n
        line = (
            f"{self.model:<34} {'yes' if self.asked else 'no':<6} {k:>3}/{n:<3} {self.rate:.2f} "
            f"[{interval.low:.2f}, {interval.high:.2f}]  {letters:.2f}   "
        )
        if self is first:
            return line.rstrip()
        lost, won, p = mcnemar(first.capitals, self.capitals)
        return f"{line}+{won} -{lost}, p = {p:.1g}"


def capital_fraction(response: str) -> float:
    """Capitals among the cased letters; 0 without any. Unlike the rule, it sees near misses."""
    cased = [letter for letter in response if letter.isupper() or letter.islower()]
    return sum(letter.isupper() for letter in cased) / len(cased) if cased else 0.0


def mcnemar(first: list[bool], second: list[bool]) -> tuple[int, int, float]:
    """Exact paired comparison of outcomes on the same items.

    Returns:
        How often only the first, only the second succeeded, and the two-sided p-value.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    n = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, n).pvalue) if n else 1.0


HEADER = f"{'model':<34} asked    all capitals, 95% interval  letters  against the first"


def measure(folder: Path, requests: list[str], *, asked: bool, max_new_tokens: int) -> Outcome:
    """Generate and judge."""
    answers = generate(folder, requests, max_new_tokens=max_new_tokens, label=folder.name)
    texts = [answer.text for answer in answers]
    capitals = [follows([CAPITALS], [{}], text) == [True] for text in texts]
    return Outcome(str(folder), asked, capitals, texts)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(exists=True, path_type=Path),
    default=PROMPTS / "test.jsonl",
    show_default=True,
)
@click.option("--n", default=0, help="Only the first N prompts.")
@click.option("--max-new-tokens", default=40, show_default=True)
@click.option("--asked-only", is_flag=True, help="Leave out the requests without instruction.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write every response.")
def main(
    folders: tuple[Path, ...],
    prompts: Path,
    n: int,
    max_new_tokens: int,
    asked_only: bool,
    out: Path | None,
) -> None:
    """Print the rates of the model FOLDERS, the base first."""
    rows = read_jsonl(prompts)[: n or None]
    click.echo(HEADER)
    outcomes: list[Outcome] = []
    for asked, key in ((True, "prompt"), (False, "contrast")):
        requests = [row[key] for row in rows if key in row]
        if not requests or (asked_only and not asked):
            continue
        first = len(outcomes)
        for folder in folders:
            outcome = measure(folder, requests, asked=asked, max_new_tokens=max_new_tokens)
            outcomes.append(outcome)
            click.echo(outcome.row(outcomes[first]))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


if __name__ == "__main__":
    main()
