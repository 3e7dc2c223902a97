"""JSONL tasks: reading, answering, checking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.utils import ModelOutput

from mergekit_wp.comparison.compare import cut_short
from mergekit_wp.comparison.results import Job, Results
from mergekit_wp.errors import UserError
from mergekit_wp.models import generation
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask, answers
from tests.models import EOS, LETTERS, make_model, save
from tests.oracle import greedy

torch.set_num_threads(1)
NONE = Checkers.load(None)


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    model = make_model("llama-tied", seed=5)
    save(model, folder)
    return model, TextInterface.read(folder, "model")


PROMPTS = ["abc", "b", "hgfedcba", "kk", "z", "abcabcabc", "q0"]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_answers_are_those_of_one_prompt_at_a_time(world, batch_size: int | None) -> None:
    model, asked = world
    budgets = [6, 2, 6, 6, 1, 6, 4]
    found = answers(model, asked, PROMPTS, budgets, batch_size)
    for prompt, budget, (text, ended) in zip(PROMPTS, budgets, found, strict=True):
        ids = greedy(model, [LETTERS.index(c) for c in prompt], budget, EOS)
        assert ended is (ids[-1] == EOS)
        assert text == asked.tokenizer.decode(ids, skip_special_tokens=True)


def test_scores_are_in_the_files_order_and_by_split(world, tmp_path: Path) -> None:
    model, asked = world
    right = answers(model, asked, PROMPTS, [6] * 7)
    lines = [
        {"prompt": p, "answer": text if i % 2 else "no", "split": "test" if i < 5 else "valid",
         "checker": "contains", "id": f"item {i}"}
        for i, (p, (text, _)) in enumerate(zip(PROMPTS, right, strict=True))
    ]  # fmt: skip
    task = JsonlTask.read(write(tmp_path / "t.jsonl", *lines), NONE, max_new_tokens=6)
    assert (task.name, task.count("test"), task.count("valid")) == ("t", 5, 2)
    found = task.evaluate(model, asked, "test")
    assert [x.item for x in found] == [f"item {i}" for i in range(5)]
    assert [x.score for x in found] == [0, 1, 0, 1, 0]
    assert [x.output for x in found] == [text for text, _ in right[:5]]
    assert [task.question(x.item) for x in found] == PROMPTS[:5]
    chat = {"prompt": [{"role": "user", "content": "abc"}], "answer": "b", "split": "test"}
    assert JsonlTask.read(write(tmp_path / "c.jsonl", chat), NONE).question("1") == "abc"


def test_an_answer_that_was_cut_is_not_exact(world, tmp_path: Path) -> None:
    model, asked = world
    ((text, ended),) = answers(model, asked, ["abc"], [3])
    assert not ended
    line = {"prompt": "abc", "answer": text, "split": "test", "max_new_tokens": 3}
    wrong, inside = line | {"answer": "no", "id": "no"}, line | {"checker": "contains", "id": "in"}
    task = JsonlTask.read(write(tmp_path / "t.jsonl", line, wrong, inside), NONE)
    found = task.evaluate(model, asked, "test")
    assert [(x.score, x.cut) for x in found] == [(0, True), (0, False), (1, False)]
    with Results(tmp_path / "out", {}) as results:
        for model, split in (("ties", "test"), ("base", "test"), ("ties", "valid")):
            results.add(Job.of(model, {}, 0, "t", split), found)  # type: ignore[arg-type]
        [warning] = cut_short(results, [task])
    assert warning.partition("; ")[0] == (
        "warning: right answers to task 't' had not ended at the most tokens they may have, and "
        "count as wrong (ties 1, base 1)"
    )
    lines = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [x["cut"] for x in lines] == [True, False, False] * 3


@pytest.mark.parametrize(
    ("checker", "item", "right", "wrong"),
    [
        ("exact", {"answer": "42"}, [" 42\n"], ["42!", "4 2", ""]),
        ("contains", {"answer": "42"}, ["it is 42."], ["it is 4"]),
        ("number", {"answer": "1200"}, ["so 3 + 4 = 1,200.", "1200.0"], ["1200 or 7", "none"]),
        ("number", {"answer": -5}, ["x = -5"], ["x = 5"]),
        ("regex", {"pattern": "^a+$"}, ["aaa"], ["aab"]),
        (
            "ifeval",
            {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"]},
            ['"no comma"'],
            ['"a, b"', "no quotes", " "],
        ),
    ],
)
def test_checkers(checker: str, item: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    item = item | {"checker": checker, "id": "1"}
    assert [NONE.judge(item, text) for text in right] == [1.0] * len(right)
    assert [NONE.judge(item, text) for text in wrong] == [0.0] * len(wrong)


def test_own_checkers(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\n"
        "def half(item, output):\n    return 0.5\n"
        "def breaks(item, output):\n    return 1 / 0\n"
        "def _hidden(item, output):\n    return 1\n"
    )
    own = Checkers.load(file)
    assert set(own.known) - set(NONE.known) == {"half", "breaks"}
    assert own.judge({"checker": "half", "id": "1"}, "") == 0.5
    with pytest.raises(UserError, match="checker 'breaks' fails on item 7: ZeroDivisionError"):
        own.judge({"checker": "breaks", "id": "7"}, "")
    with pytest.raises(UserError, match="checker 'number' fails on item 7: ValueError"):
        own.judge({"checker": "number", "id": "7", "answer": "many"}, "3")
    with pytest.raises(UserError, match="checker 'regex' fails on item 7: error: unterminated"):
        own.judge({"checker": "regex", "id": "7", "pattern": "[a"}, "3")
    with pytest.raises(KeyError, match="answer"):  # a reader of ours let it through: no user's
        own.judge({"checker": "exact", "id": "7"}, "3")
    task = write(tmp_path / "t.jsonl", {"prompt": "a", "split": "test", "checker": "half"})
    first = JsonlTask.read(task, own).fingerprint
    file.write_text(file.read_text() + "\n")
    assert JsonlTask.read(task, Checkers.load(file)).fingerprint != first
    file.write_text("raise ValueError('no')")
    with pytest.raises(UserError, match=r"mine.py fails when it is run: ValueError: no"):
        Checkers.load(file)
    with pytest.raises(UserError, match="no such Python file"):
        Checkers.load(tmp_path / "none.py")


GOOD = {"prompt": "a", "answer": "b", "split": "test"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: not JSON"),
        (["3"], "line 1: expected an object"),
        ([GOOD | {"prompt": 3}], "'prompt' must be a text or chat messages"),
        ([GOOD | {"prompt": ""}], "'prompt' is empty"),
        ([GOOD, {"prompt": "a", "answer": "b"}], "line 2: 'split' is None; write \"valid\""),
        ([GOOD | {"split": "train"}], "'split' is 'train'"),
        ([GOOD | {"checker": "os.system"}], "unknown checker 'os.system'; known are exact"),
        ([{"prompt": "a", "split": "test"}], "checker 'exact' needs 'answer'"),
        ([GOOD | {"checker": "regex"}], "checker 'regex' needs 'pattern'"),
        ([GOOD | {"id": 1}, GOOD | {"id": "1"}], "line 2: id '1' stands twice"),
        ([GOOD | {"max_new_tokens": 0}], "'max_new_tokens' must be a whole number from 1"),
        ([""], "holds no items"),
    ],
)
def test_bad_files(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        JsonlTask.read(write(tmp_path / "t.jsonl", *lines), NONE)
    assert message in str(raised.value) and "t.jsonl" in str(raised.value)
    with pytest.raises(UserError, match=r"none.jsonl cannot be read"):
        JsonlTask.read(tmp_path / "none.jsonl", NONE)


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful:
        dtype, config = torch.float32, LlamaConfig()

        def __call__(self, **_: Any) -> ModelOutput:
            return ModelOutput(logits=torch.zeros(1, 1, 5))

    with pytest.raises(UserError, match="Forgetful gives no cache"):
        generation.greedy(Forgetful(), [[1, 2]], 3, [4], "cpu")


def test_the_head_is_one_product_for_all_prompts(world) -> None:
    model, asked = world
    entered = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        answers(model, asked, ["abcdefgh"] * 3, [3] * 3)
    finally:
        handle.remove()
    assert len(entered) == 3
    for hidden in entered:  # of a slice torch would multiply the vocabulary three times
        assert hidden.shape[:2] == (3, 1) and hidden.is_contiguous()
