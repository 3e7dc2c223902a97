"""The three skills of the real-model benchmark: splits apart, answers right by their checkers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from benchmarks.items import Item, Split, split_of, task_line, unique
from benchmarks.smollm2 import checkers
from benchmarks.smollm2.ifeval import identity
from benchmarks.smollm2.skills import code, instruction, math
from benchmarks.smollm2.skills.code import FAMILIES, Family, assertions, solve
from mergekit_wp.tasks import ifeval
from mergekit_wp.tasks.checkers import BUILT_IN, NEEDS

SPLITS: tuple[Split, ...] = ("train", "score", "valid", "test")
REQUESTS = [f"Write a short poem about subject number {i}." for i in range(120)]


def requests(split: Split) -> list[str]:
    return [request for request in REQUESTS if split_of(identity(request)) == split]


def instruction_items(split: Split) -> Iterator[Item]:
    plain = 'Well, the "moon" is a *bright* thing, and it shines on us. It never sleeps, they say'
    return instruction.items(split, 0, dict.fromkeys(requests(split), plain))


STREAMS = {
    "math": lambda split: math.items(split, 0),
    "code": lambda split: code.items(split, 0),
    "instruction": instruction_items,
}


@pytest.mark.parametrize("skill", STREAMS)
def test_splits_share_neither_prompts_nor_keys(skill: str) -> None:
    items = {split: list(islice(STREAMS[skill](split), 300)) for split in SPLITS}
    for read in (lambda item: item.prompt, lambda item: item.key):
        owners = Counter(value for split in SPLITS for value in {read(i) for i in items[split]})
        assert max(owners.values()) == 1
    assert all(items.values())


@pytest.mark.parametrize("skill", STREAMS)
def test_items_do_not_depend_on_anything_but_split_and_seed(skill: str) -> None:
    first, second = (list(islice(STREAMS[skill]("test"), 50)) for _ in range(2))
    assert first == second


def test_numbers_of_the_test_are_never_trained_on_in_any_wording() -> None:
    pairs = {
        split: {
            tuple(sorted(map(int, re.findall(r"\d+", item.prompt))))
            for item in islice(math.items(split, 0), 500)
        }
        for split in SPLITS
    }
    assert not pairs["train"] & (pairs["test"] | pairs["valid"])


def test_wordings_kept_for_the_test_are_in_no_training_prompt() -> None:
    kept = ("What do you get when", "How many animals", "cookies remain", "How many toys")
    trained = [item.prompt for item in islice(math.items("train", 0), 1000)]
    tested = [item.prompt for item in islice(math.items("test", 0), 200)]
    assert not any(words in prompt for prompt in trained for words in kept)
    assert all(any(words in prompt for prompt in tested) for words in kept)
    last = [wordings[-1].split("{")[0] for wordings in instruction.WORDINGS.values()]
    trained = [item.prompt for item in islice(instruction_items("train"), 300)]
    assert not any(words in prompt for prompt in trained for words in last)


def test_math_answers_against_the_numbers_in_the_prompt() -> None:
    for item in islice(math.items("train", 0), 500):
        a, b = map(int, re.findall(r"\d+", item.prompt))
        sign = item.response.split()[1]
        # the two prompts that name the numbers the other way round still mean the response's
        left, right = map(int, re.findall(r"\d+", item.response.split("=")[0]))
        assert {left, right} == {a, b}
        assert (
            int(item.fields["answer"])
            == {
                "+": left + right,
                "-": left - right,
                "x": left * right,
            }[sign]
        )
        assert BUILT_IN["number"]({"answer": item.fields["answer"]}, item.response)
        assert not BUILT_IN["number"]({"answer": item.fields["answer"]}, item.response + "1")


@pytest.mark.parametrize("name", instruction.WORDINGS)
def test_answers_by_rule_follow_their_rule_and_the_plain_answer_mostly_does_not(name: str) -> None:
    items = islice(instruction_items("train"), 120)
    found = [item for item in items if item.fields["instruction_id_list"] == [name]]
    assert len(found) == 20
    for item in found:
        assert ifeval.follows([name], item.fields["kwargs"], item.response) == [True], item
    plain = [ifeval.follows([name], item.fields["kwargs"], "One, two.") for item in found]
    assert not any(verdict for (verdict,) in plain)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("One. Two three.", "One. Two three."),
        ("One is short. Two goes on and on without end", "One is short."),
        ("no end,", "no end."),
        ("a  b\n\nc", "a b c."),
        ("one two three four five six", "one two three four."),
    ],
)
def test_first_sentences(answer: str, expected: str) -> None:
    words = 4 if answer.startswith("one two") else 22
    assert instruction.first_sentences(answer, words) == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_reference_passes_its_assertions_and_a_wrong_one_fails(family: Family) -> None:
    n = family.parameters()[2]
    tests = assertions(family, n)
    exec("\n".join([solve(family, n), *tests]), {})
    head = solve(family, n).split("\n")[0]
    for body in ("return None", f"return [{family.arguments}]", "return 'nothing'"):
        with pytest.raises(AssertionError):
            exec("\n".join([head, f"    {body}", *tests]), {})


def test_a_reference_passes_the_checker_and_its_task_line_has_what_the_checker_reads() -> None:
    for number, item in enumerate(islice(code.items("test", 0), 3)):
        line = task_line(number, "test", item, 48)
        assert checkers.code(line, item.response)
        assert not checkers.code(line, item.response.replace("return", "return 1, "))
    line = task_line(0, "test", next(math.items("test", 0)), 48)
    assert set(NEEDS[line["checker"]]) <= set(line)
    line = task_line(0, "test", next(instruction_items("test")), 48)
    assert set(NEEDS[line["checker"]]) <= set(line)


def test_unique_keeps_the_first_of_each_prompt() -> None:
    stream = (Item(str(i % 3), str(i), "exact", "k") for i in range(10))
    assert [item.response for item in unique(stream, 3)] == ["0", "1", "2"]
