"""The second family: splits apart, answers right by rules of their own, checkers strict."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.family import Family
from benchmarks.files import REPO, read_jsonl
from benchmarks.gemma3.checkers import record
from benchmarks.gemma3.tasks import COUNTS, GEMMA3, MAX_NEW_TOKENS, STREAMS
from benchmarks.items import Item, Split, split_of, write_skill
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask

SPLITS: tuple[Split, ...] = ("train", "score", "valid", "test")


def items(skill: str, split: Split, count: int = 300) -> list[Item]:
    return list(islice(STREAMS[skill](split, 0), count))


@pytest.mark.parametrize("skill", STREAMS)
def test_splits_share_neither_prompts_nor_keys(skill: str) -> None:
    found = {split: items(skill, split) for split in SPLITS}
    for read in (lambda item: item.prompt, lambda item: item.key):
        owners = Counter(value for split in SPLITS for value in {read(i) for i in found[split]})
        assert max(owners.values()) == 1
    assert all(split_of(item.key) == split for split in SPLITS for item in found[split])


@pytest.mark.parametrize("skill", STREAMS)
def test_items_depend_on_split_and_seed_alone(skill: str) -> None:
    assert items(skill, "test", 50) == items(skill, "test", 50)
    assert items(skill, "test", 50) != list(islice(STREAMS[skill]("test", 1), 50))


def test_dates_by_the_calendar() -> None:
    for item in items("dates", "train"):
        written = re.fullmatch(r"Write (.*) as a date\.\nAnswer:", item.prompt)
        assert written is not None
        form = "%d %B %Y" if written[1][0].isdigit() else "%B %d, %Y"
        day = datetime.strptime(written[1], form).date()
        assert item.response.strip() == day.isoformat() == item.fields["answer"]


def test_lists_backwards_are_the_lists_again() -> None:
    for item in items("reversal", "train"):
        asked = item.prompt.removeprefix("Write ").split(" backwards.")[0].split(", ")
        answer = item.response.strip().split(", ")
        assert [asked[-1 - i] for i in range(len(asked))] == answer
        assert len(set(asked)) == len(asked) >= 3


def test_records_say_what_the_sentence_says() -> None:
    for item in items("records", "train"):
        said = json.loads(item.response)
        assert set(said) == {"name", "born"}
        assert f"{said['name']}" in item.prompt
        assert item.prompt.endswith(f", {said['born']} as a record.\nAnswer:")


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (' {"name": "Anna", "age": 34}', True),
        ('{"age": 34,\n "name": "Anna"}', True),
        ('{"name": "Anna", "age": 34} and more', False),
        ('{"name": "Anna", "age": "34"}', False),
        ('{"name": "Anna", "age": 34.0}', False),
        ('{"name": "Anna", "age": true}', False),
        ('{"name": "Anna"}', False),
        ('{"name": "Anna", "age": 34, "city": "Oslo"}', False),
        ('[{"name": "Anna", "age": 34}]', False),
        ("Anna is 34", False),
        ("", False),
    ],
)
def test_a_record_is_its_object_and_nothing_else(output: str, right: bool) -> None:
    assert record({"answer": {"name": "Anna", "age": 34}}, output) is right


def test_files_are_read_by_the_package_and_own_answers_pass(tmp_path: Path) -> None:
    checkers = Checkers.load(REPO / GEMMA3.here / "checkers.py")
    for name, stream in STREAMS.items():
        write_skill(name, stream, tmp_path, {**COUNTS, "train": 8}, MAX_NEW_TOKENS)
        task = JsonlTask.read(tmp_path / "tasks" / f"{name}.jsonl", checkers)
        assert (task.count("valid"), task.count("test")) == (COUNTS["valid"], COUNTS["test"])
        answers = {item.prompt: item.response for item in items(name, "test", 2000)}
        for item in task.of("test"):
            assert checkers.judge(item, answers[item["prompt"]]) == 1
            assert checkers.judge(item, answers[item["prompt"]] + " x") == 0
        assert len(read_jsonl(tmp_path / "prompts" / f"{name}.jsonl")) == COUNTS["score"]


def test_a_family_has_all_pairs_and_all_together_and_seeds_apart() -> None:
    family = Family("gemma3", ("a", "b", "c"))
    assert family.combinations == (("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"))
    other = Family("gemma3", ("a", "b", "c"), seed=2)
    assert family.expert("a") != other.expert("a")
    assert (family.base, family.task("a")) == (other.base, other.task("a"))
