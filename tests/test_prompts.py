"""Prompt files and their tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from mergekit_wp.errors import UserError
from mergekit_wp.models.encoding import encode_pair, encode_prompt
from mergekit_wp.prompts import (
    Prompt,
    PromptBatch,
    Sample,
    batches,
    read_prompts,
)
from mergekit_wp.prompts.preview import look
from mergekit_wp.prompts.request import PromptsRequest
from mergekit_wp.scoring.score import choose_criteria
from tests.models import EOS, LETTERS, make_model, save


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = save(make_model("llama-tied"), tmp_path_factory.mktemp("m"))
    return AutoTokenizer.from_pretrained(folder)


def test_reading_survives_what_editors_do(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "a\u2028b", "note": 1}', "", '{"prompt": "c", "response": ""}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = read_prompts(path, None)
    assert [p.prompt for p in found.prompts] == ["a\u2028b", "c"]
    assert found.prompts[1].response == ""
    assert len(read_prompts(path, 1).prompts) == 1
    assert read_prompts(path, 1).sha256 == found.sha256


def test_no_file_is_replaced_by_what_was_read(tmp_path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match="p.jsonl exists already; give another file"):
        look(PromptsRequest.of(source=source, out=source, max_prompts=1))
    assert len(source.read_text().splitlines()) == 2
    look(PromptsRequest.of(source=source, out=tmp_path / "new.jsonl", max_prompts=1))
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '"text"',
        "3",
        "null",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"prompt": "a", "response": 1}',
        "[" * 100000,
    ],
)
def test_a_broken_line_is_named(tmp_path, line) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: "):
        read_prompts(path, None)


def test_tokens_are_prompt_response_end(tokenizer) -> None:
    assert encode_prompt(tokenizer, "abc") == [0, 1, 2]
    assert encode_pair(tokenizer, "abc", "d") == ([0, 1, 2], [3, EOS], True)
    sample = Sample((0, 1, 2), (3, EOS))
    assert sample.input_ids == (0, 1, 2, 3)
    batch = PromptBatch.of([sample, Sample((5,), (EOS,))], [4, 7], "cpu")
    assert batch.ids.tolist() == [[0, 1, 2, 3], [5, 0, 0, 0]]
    assert batch.last.tolist() == [2, 0]
    predicted = list(
        zip(batch.rows.tolist(), batch.cols.tolist(), batch.targets.tolist(), strict=True)
    )
    assert predicted == [(0, 2, 3), (0, 3, EOS), (1, 0, EOS)]


def test_chat_templates_are_applied(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}0{% endfor %}"
        "{% if add_generation_prompt %}1{% endif %}"
    )
    try:
        ids = [LETTERS.index(c) for c in "ab01"]
        assert encode_prompt(tokenizer, "ab") == ids
        messages = Prompt.model_validate(
            {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
        ).prompt
        assert encode_prompt(tokenizer, messages) == [LETTERS.index(c) for c in "a0b01"]
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(UserError, match="chat template refuses prompt .*no system role"):
            encode_prompt(tokenizer, messages)
    finally:
        tokenizer.chat_template = None


def test_batches_hold_every_prompt_once() -> None:
    samples = [Sample(tuple(range(1 + i % 4)), (1,)) for i in range(10)]
    found = list(batches(samples, 3, "cpu"))
    assert sorted(torch.cat([b.members for b in found]).tolist()) == list(range(10))
    assert [b.size for b in found] == [3, 3, 3, 1]
    for batch in found:
        for row, member in enumerate(batch.members.tolist()):
            ids = samples[member].input_ids
            assert batch.ids[row, : len(ids)].tolist() == list(ids)


def test_default_criteria() -> None:
    def prompts(*contrasts):
        return [Prompt(prompt="a", contrast=c) for c in contrasts]

    assert choose_criteria(None, prompts(None, None)) == ("kl",)
    assert choose_criteria(None, prompts("b", None)) == ("kl",)
    assert choose_criteria(None, prompts("b", "c", None)) == ("kl", "anchor")
    assert choose_criteria(("logprob",), prompts("a", "a")) == ("logprob",)
    with pytest.raises(UserError, match="no usable contrast"):
        choose_criteria(None, prompts("a", ""))


def test_json_of_a_prompt_file_round_trips(tmp_path) -> None:
    item = {"prompt": [{"role": "user", "content": "x"}], "contrast": "y", "response": "z"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(item))
    prompt = read_prompts(path, None).prompts[0]
    assert prompt.model_dump() == item
