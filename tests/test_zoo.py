from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zoo.evaluate import accuracy, load_model, load_questions, table
from benchmarks.zoo.tasks import (
    CHARACTERS,
    EXPERT_SKILLS,
    SKILLS,
    Skill,
    Split,
    distinct_items,
    follow,
    is_correct,
    items,
    split_of,
)
from benchmarks.zoo.tokenizer import build_tokenizer, save_tokenizer
from benchmarks.zoo.train import BASE, EXPERTS, IGNORED, collate, schedule, training_pairs

CHECKPOINTS = Path(__file__).resolve().parents[1] / "benchmarks" / "zoo" / "checkpoints"
MODELS = ("base", *EXPERT_SKILLS)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for a second thread to pay for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("skill", SKILLS)
def test_items_are_a_function_of_skill_split_and_seed(skill: Skill):
    assert list(islice(items(skill, "train", 3), 50)) == list(islice(items(skill, "train", 3), 50))
    assert list(islice(items(skill, "train", 3), 50)) != list(islice(items(skill, "train", 4), 50))


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_input(skill: Skill):
    splits: tuple[Split, ...] = ("train", "valid", "test")
    keys = {split: {item.key for item in islice(items(skill, split, 0), 400)} for split in splits}
    for split in splits:
        assert {split_of(key) for key in keys[split]} == {split}
        assert all(keys[split].isdisjoint(keys[other]) for other in splits if other != split)


def test_other_guises_of_an_input_stay_in_its_split():
    sums = {item.prompt[:-1]: item.key for item in islice(items("math", "test", 0), 400)}
    for text in sums:
        a, b = text.split("+")
        assert sums.get(f"{b}+{a}", sums[text]) == sums[text]
    for item in islice(items("sort", "test", 0), 50):
        assert split_of("".join(sorted(item.prompt[1:-1]))) == "test"


def test_answers_are_right():
    for item in islice(items("math", "test", 0), 50):
        a, b = item.prompt[:-1].split("+")
        assert int(item.answer[::-1]) == int(a) + int(b)
    for item in islice(items("sort", "test", 0), 50):
        assert item.answer == "".join(sorted(item.prompt[1:-1]))
    for item in islice(items("inst", "test", 0), 50):
        wanted, text = item.prompt[:-1].split("|")
        assert item.answer == follow(text, wanted) != text
        assert item.contrast == f"|{text}="


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("^", "ABCE"),
        ('"', '"abce"'),
        ("~", "bc"),
        ("*", "*abce*"),
        ('*"', '*"abce"*'),
        ("^~", "BC"),
    ],
)
def test_follow(wanted: str, answer: str):
    assert follow("abce", wanted) == answer


def test_checker_wants_the_answer_and_nothing_else():
    assert is_correct("abc", "abc")
    assert not any(is_correct("abc", text) for text in ("ab", "abcd", "", " abc", "ABC"))


def test_tokenizer_round_trip_after_autotokenizer(tmp_path: Path):
    save_tokenizer(build_tokenizer(CHARACTERS), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer(CHARACTERS).input_ids) == len(CHARACTERS) + 1
    for skill in SKILLS:
        for item in distinct_items(skill, "test", 0, 30):
            ids = tokenizer(item.prompt).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert len(ids) == len(item.prompt) + 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == item.prompt
            answer = tokenizer(item.answer, add_special_tokens=False).input_ids
            assert len(answer) == len(item.answer)
            assert tokenizer.decode(answer) == item.answer
            assert tokenizer.unk_token_id not in ids + answer


def test_only_the_answer_and_its_end_are_learned():
    tokenizer = build_tokenizer(CHARACTERS)
    ids, labels = collate(tokenizer, [("%cab=", "abc"), ("17+25=", "24")])
    learned = [row[row != IGNORED].tolist() for row in labels]
    assert [tokenizer.decode(row) for row in learned] == ["abc</s>", "24</s>"]
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_experts_train_on_answers_and_the_base_mostly_on_echoes():
    followed = [answer[::-1] for _, answer in islice(training_pairs(EXPERTS["math"], 0), 20)]
    assert all(text.isdigit() for text in followed)
    pairs = islice(training_pairs(BASE, 0), 400)
    echoed = [target in prompt for prompt, target in pairs]
    assert 0.5 < sum(echoed) / len(echoed) < 0.8


def test_schedule_warms_up_and_ends_near_zero():
    factors = [schedule(step, BASE) for step in range(BASE.steps)]
    assert factors[0] == 1 / BASE.warmup
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.02, abs=1e-3)


def test_checkpoints_are_small_and_in_bfloat16():
    weights = [CHECKPOINTS / name / "model.safetensors" for name in MODELS]
    everything = sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file())
    assert everything < 5_000_000
    for path in weights:
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="auto")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_committed_data_is_of_the_right_split():
    for skill in EXPERT_SKILLS:
        lines = (CHECKPOINTS / "prompts" / f"{skill}.jsonl").read_text().splitlines()
        prompts = {json.loads(line)["prompt"] for line in lines}
        questions = load_questions(CHECKPOINTS / "eval" / f"{skill}.jsonl")
        assert (len(prompts), len(questions)) == (128, 200)
        assert prompts.isdisjoint(prompt for prompt, _ in questions)
        assert questions == [(q.prompt, q.answer) for q in distinct_items(skill, "test", 0, 200)]


@pytest.mark.parametrize("skill", EXPERT_SKILLS)
def test_expert_beats_the_base_on_its_skill(skill: Skill):
    questions = load_questions(CHECKPOINTS / "eval" / f"{skill}.jsonl")[:50]
    expert = accuracy(*load_model(CHECKPOINTS / skill), questions)
    base = accuracy(*load_model(CHECKPOINTS / "base"), questions)
    assert expert >= 0.9
    assert base < 0.5


def test_table():
    text = table({"base": {"inst": 0.0, "copy": 1.0}})
    assert text.splitlines() == [
        "| model | inst | copy |",
        "|---|---|---|",
        "| base | 0.000 | 1.000 |",
    ]
