"""Prompt and response are tokenised as one text, and templates read one date."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mergekit_wp.errors import UserError
from mergekit_wp.models.encoding import Clock, encode_pair, encode_prompt, set_clock, today
from mergekit_wp.prompts import Prompt, PromptSet
from mergekit_wp.runs.texts import encode_texts
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from tests.models import perturbed
from tests.test_scoring import Quiet

torch.set_num_threads(1)

BOS, END = 1, 2
Pieces = PreTrainedTokenizerFast


def sentencepiece(scheme: str = "always") -> Pieces:
    """As Llama 2's: a blank in front of every text, blanks are part of tokens, then bytes."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": END}
    vocabulary |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    merges = [("▁", "a"), ("b", "c"), ("▁", "7"), ("▁7", "4")]
    for token in [*map(chr, range(33, 127)), "▁", *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    bpe = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=False
    )
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    bpe.add_special_tokens(["<s>", "</s>", "<unk>"])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return Pieces(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def whole(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The oracle: transformers' own tokenizer on the whole text, and the end token."""
    return [*tokenizer(text, **options).input_ids, END]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("33+14=", "74"), ("33+14=", " 74"), ("a b", "\n74"), ("x é", "ü y"), ("say: ", "")],
)
def test_the_tokens_are_those_of_the_whole_text(prompt: str, response: str) -> None:
    tokenizer = sentencepiece()
    parts = encode_pair(tokenizer, prompt, response)
    assert parts.prompt + parts.response == whole(tokenizer, prompt + response)
    assert parts.prompt == tokenizer(prompt).input_ids
    assert parts.as_alone


def test_a_token_that_the_prompt_only_begins_belongs_to_the_response() -> None:
    tokenizer = sentencepiece()
    for prompt, response, cut in (("33+14= ", "74", "33+14="), ("ab", "c", "a")):
        parts = encode_pair(tokenizer, prompt, response)
        assert parts.prompt == tokenizer(cut).input_ids
        assert parts.prompt + parts.response == whole(tokenizer, prompt + response)
        assert not parts.as_alone


def test_such_a_cut_is_said_once() -> None:
    given = [("q", "74"), ("33+14= ", "74"), ("ab", "c")]
    prompts = tuple(Prompt(prompt=p, response=r) for p, r in given)
    progress = Quiet()
    encode_texts(sentencepiece(), PromptSet(prompts, "", "prompt file p.jsonl", "p"), progress)
    [note] = progress.notes
    assert note.startswith("prompt file p.jsonl: 2 prompts, the first of them number 2, and the")
    assert "belongs to the response" in note
    progress = Quiet()
    encode_texts(sentencepiece(), PromptSet(prompts[:1], "", "p", "p"), progress)
    assert not progress.notes


def test_a_prompt_does_not_end_with_an_end_token_that_the_tokenizer_adds() -> None:
    """As lm-eval has it; one that stands in the text stays."""
    tokenizer = sentencepiece()
    plain = encode_prompt(tokenizer, "21+1=")
    tokens = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(zip(["<s>", "</s>"], tokens, strict=True))
    )
    assert tokenizer("21+1=").input_ids[-1] == tokens[1]
    assert encode_prompt(tokenizer, "21+1=") == plain
    parts = encode_pair(tokenizer, "21+1=", "22")
    assert (parts.prompt, parts.as_alone) == (plain, True)
    assert parts.response.count(tokens[1]) == 1
    written = encode_prompt(tokenizer, "21+1=</s>")
    assert written == [*plain, tokens[1]]


def test_a_prompt_and_response_of_one_token_are_refused() -> None:
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer = Pieces(tokenizer_object=bpe, eos_token="</s>")
    with pytest.raises(UserError, match="prompt 'a' and its response begin with one token"):
        encode_pair(tokenizer, "a", "b")
    assert encode_pair(tokenizer, "b", "ab")[:2] == ([1], [2, 3])


def test_a_cut_between_tokens_is_found_where_the_prompt_is_split_otherwise() -> None:
    # 'abc' alone is a+bc, before 'd' it is ab+c, and 'd' a token of its own
    merges = [("c", "_"), ("b", "c"), ("a", "b")]
    vocabulary = {t: i for i, t in enumerate([*"abcd_", "c_", "bc", "ab", "</s>"])}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.normalizer = normalizers.Replace("cd", "c_d")
    tokenizer = Pieces(tokenizer_object=bpe, eos_token="</s>")
    parts = encode_pair(tokenizer, "abc", "d")
    assert parts.prompt + parts.response == [*tokenizer("abcd").input_ids, 8]
    assert tokenizer.convert_ids_to_tokens(parts.response)[-2:] == ["d", "</s>"]
    assert not parts.as_alone


def test_an_end_token_that_the_tokenizer_writes_is_not_doubled() -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", END)]
    )
    parts = encode_pair(tokenizer, "a", "b")
    assert parts.prompt + parts.response == tokenizer("ab").input_ids


TEMPLATES = {
    "as Llama 3's, which trims": (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "as Llama 2's, with blanks": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
    ),
    "as ChatML, which ends otherwise": (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}


@pytest.mark.parametrize("response", ["74", " 74", "74\n", "say 74"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_what_the_template_writes(name: str, response: str) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = TEMPLATES[name]
    user = {"role": "user", "content": "33+14="}
    messages = [user, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    wanted = whole(tokenizer, text.removesuffix("[end]\n").removesuffix("</s>"),
                   add_special_tokens=False)  # fmt: skip
    parts = encode_pair(tokenizer, "33+14=", response)
    assert parts.prompt + parts.response == wanted
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert parts.prompt == tokenizer(asked, add_special_tokens=False).input_ids


def test_a_template_that_does_not_go_on_from_the_prompt_changes_no_answer() -> None:
    tokenizer = sentencepiece()
    for template in (
        "{% for m in messages %}{{ m['content'] }}!{% endfor %}{% if add_generation_prompt %}?"
        "{% endif %}",
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['content'] }}!?{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] }}!?{% endfor %}",
    ):
        tokenizer.chat_template = template
        parts = encode_pair(tokenizer, "q", " 74 ")
        text = "q!? 74 "
        assert parts.prompt + parts.response == whole(tokenizer, text, add_special_tokens=False)


def test_the_expert_is_asked_for_what_it_has_learnt(tmp_path: Path) -> None:
    """``logprob`` is what transformers finds in the whole text."""
    tokenizer = sentencepiece()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3, bos_token_id=BOS, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    expert = perturbed(base, 0.1)
    for model, name in ((base, "base"), (expert, "expert")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sums = [(f"{a}+1=", str(a + 1)) for a in (20, 37, 64)]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in sums))
    request = ScoreRequest(
        base=str(tmp_path / "base"), expert=str(tmp_path / "expert"), prompts=prompts,
        criterion=("logprob",), estimand=("share",), share_steps=1, dtype="float64",
    )  # fmt: skip
    scale = score(request, Quiet()).manifest.scale["logprob"]
    plain = AutoTokenizer.from_pretrained(tmp_path / "expert")
    for model, found in ((base, scale.base), (expert, scale.expert)):
        own = []
        for prompt, response in sums:
            ids = whole(plain, prompt + response)
            start = len(ids) - len(response) - 1  # one token a character
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own.append(sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))) / 3)
        assert found == pytest.approx(math.fsum(own) / 3, abs=1e-9)


# --- the date --------------------------------------------------------------------------------

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today is {{ date_string }}. {% for m in messages %}{{ m['content'] }}{% endfor %}"
)


def test_a_template_reads_the_date_of_the_clock() -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = DATED
    clock = Clock("2024-02-29")
    set_clock(tokenizer, clock)
    assert not clock.was_read
    found = tokenizer.decode(encode_prompt(tokenizer, "hello"))
    assert found == "Today is 29 Feb 2024. hello"
    assert clock.was_read
    # whoever applies the template, such as the harness, reads it too
    assert "29 Feb 2024" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %B %-d, %Y", "%Y-%m-%d", "%-m/%y", "%F %H:%M"])
def test_dates_are_written_as_strftime_writes_them(form: str) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = (
        "\n{% if strftime_now is defined %}{{ strftime_now('" + form + "') }}{% endif %} "
        "{% for m in messages %}{{ strftime_now('" + form + "') }}{% endfor %}"
    )
    set_clock(tokenizer, clock := Clock("2024-03-05"))
    wanted = datetime(2024, 3, 5, tzinfo=UTC).strftime(form)
    found = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert found == f"\n{wanted} {wanted}"
    assert clock.was_read


def test_a_date_that_is_not_written_is_not_read() -> None:
    """Granite's template tells the date only where no system message is given."""
    tokenizer = sentencepiece()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}Today is {{ strftime_now('%A') }}.{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    set_clock(tokenizer, clock := Clock("2024-02-29"))
    user = {"role": "user", "content": "x"}
    tokenizer.apply_chat_template([{"role": "system", "content": "y"}, user], tokenize=False)
    assert not clock.was_read
    assert tokenizer.apply_chat_template([user], tokenize=False) == "Today is Thursday.x"
    assert clock.was_read


def test_a_template_that_asks_for_no_date_reads_no_clock() -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = TEMPLATES["as ChatML, which ends otherwise"]
    clock = Clock("2024-02-29")
    set_clock(tokenizer, clock)
    encode_pair(tokenizer, "a", "b")
    assert not clock.was_read


def test_today_is_that_of_the_reproducible_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert today() == "2023-11-14"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH is 'yesterday'; expected seconds"):
        today()
