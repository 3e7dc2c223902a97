"""What a merge of all experts costs on text that others published: newspaper and encyclopedia.

Nothing was fitted, tuned or guarded on these texts. The newspaper are the 50 documents of Lee,
Pincombe and Welsh (2005), the encyclopedia are as many paragraphs of the English Wikipedia; both
come with the PyPI package gensim, as data of its tests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import click
import numpy as np
import yaml

from benchmarks.comparisons import OURS, commit, find, read_committed
from benchmarks.files import command, dtype, local, read_jsonl, write_jsonl
from benchmarks.fit_table import FitTable, prompts_option
from mergekit_wp.comparison.reading import read_comparison
from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.comparison.table import interval
from mergekit_wp.statistics import percentiles

TEXTS, LEAST_CHARACTERS = 50, 400
#: files of each register; intervals resample them
PARTS = 10
RESAMPLES = 2000
_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def registers() -> dict[str, list[str]]:
    """Texts by register.

    Raises:
        ClickException: gensim is not installed.
    """
    if find_spec("gensim") is None:
        raise click.ClickException("gensim is not installed; `make bench` installs it")
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from smart_open import open as smart_open

    data = Path(str(files("gensim"))) / "test" / "test_data"
    newspaper = (data / "lee.cor").read_text("latin-1").splitlines()
    paragraphs = []
    with smart_open(data / _DUMP, "rb") as dump:
        for _, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            # what is left of the markup: bold and italics
            plain = (re.sub("'{2,}", "", p).strip() for p in filter_wiki(markup).split("\n"))
            paragraphs += islice((p for p in plain if len(p) >= LEAST_CHARACTERS), 1)
    return {"newspaper": newspaper[:TEXTS], "encyclopedia": paragraphs[:TEXTS]}


def write_parts(folder: Path) -> list[Path]:
    """`PARTS` files of each register."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for register, texts in registers().items():
        for part in range(PARTS):
            found.append(folder / f"{register}-{part}.txt")
            found[-1].write_text("\n".join(texts[part::PARTS]) + "\n")
    return found


def read(table: FitTable, methods: Sequence[str], max_new_tokens: int) -> Comparison:
    """Merge all experts as the tuned comparison chose to, and read the texts.

    Raises:
        ClickException: all experts were not compared, or not by one of the methods.
    """
    family, experts = table.family, table.family.skills
    name = table.name(experts)
    tuned = find(table).get(" + ".join(experts))
    chosen = {row.name: row.setting for row in tuned.rows} if tuned else {}
    if missing := [method for method in methods if method not in chosen]:
        raise click.ClickException(f"{name} was not compared by {', '.join(missing)}; run bench")
    folder = family.folder / "public-text" / name
    grid = {method: {key: [value] for key, value in chosen[method].items()} for method in methods}
    parts = write_parts(folder / "texts")
    (folder / "grid.yml").write_text(yaml.safe_dump(grid | {OURS: {"lambda": [1.0]}}))
    for expert in experts:  # answers are not what is asked for: one item to tune on, one to test
        items = read_jsonl(family.task(expert))
        first = [next(i for i in items if i["split"] == split) for split in ("valid", "test")]
        write_jsonl(folder / "items" / f"{expert}.jsonl", first)
    given = {
        "--task": [local(folder / "items" / f"{e}.jsonl") for e in experts],
        "--keep": [local(path) for path in parts],
        "--prompts": [f"{e}={local(table.unlabelled(e))}" for e in experts],
    }
    command(
        *("mergekit-wp", "compare", local(table.fitted(experts, max_new_tokens))),
        *(part for flag, values in given.items() for value in values for part in (flag, value)),
        *("--out", local(folder / "compare"), "--grid", local(folder / "grid.yml")),
        *("--checkers", f"{family.here}/checkers.py", "--methods", ",".join([OURS, *methods])),
        *("--dtype", str(dtype()).removeprefix("torch.")),
    )
    return read_comparison(folder / "compare")


def show(comparison: Comparison) -> str:
    """Perplexity relative to the base's by register, in Markdown; intervals are over parts.

    Raises:
        ValueError: the base was not read.
    """
    if comparison.base is None:
        raise ValueError("the base was not read")
    names = list(dict.fromkeys(part.rpartition("-")[0] for part in comparison.base.kept))
    lines = [f"| perplexity, x base | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row in comparison.rows:
        if row.name not in ("base", OURS):
            cells = [_ratio(row, comparison.base, name) for name in names]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(row: Row, base: Row, register: str) -> str:
    parts = [name for name in row.kept if name.rpartition("-")[0] == register]
    lost = np.array([base.kept[name] - row.kept[name] for name in parts])
    chosen = np.random.default_rng(0).integers(len(lost), size=(RESAMPLES, len(lost)))
    return interval(percentiles(float(np.exp(lost.mean())), np.exp(lost[chosen].mean(1))))


def run(table: FitTable, methods: str, max_new_tokens: int, *, print_only: bool) -> None:
    """Read what is missing, commit it, and print the table.

    Raises:
        ClickException: there is nothing to print.
    """
    committed = table.committed / "public-text" / f"{table.name(table.family.skills)}.json"
    if not print_only:
        commit(read(table, methods.split(","), max_new_tokens), committed)
    if not committed.exists():
        raise click.ClickException(f"{local(committed)} is missing; run without --print")
    click.echo(show(read_committed(committed)))


def options(main: click.decorators.FC) -> click.decorators.FC:
    """The options of a family's command."""
    for add in (
        click.option("--print", "print_only", is_flag=True, help="Only print what is committed."),
        click.option("--methods", default="regmean", show_default=True, help="Peers, A,B,..."),
        click.option("--fit", default="", help="Further options of the fit, as of `bench`."),
        prompts_option("As of `bench`."),
        click.option("--seed", default=0, show_default=True, help="Of the experts' training."),
    ):
        main = add(main)
    return main
