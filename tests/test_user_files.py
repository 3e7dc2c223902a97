"""What users' own files hold: tasks' answers, chat messages, other formats, and model cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mergekit_wp.card.front_matter import with_keys
from mergekit_wp.cli import cli
from mergekit_wp.comparison.merging import keeps_shapes
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.errors import UserError
from mergekit_wp.files.untrusted import parse_yaml
from mergekit_wp.joint.members import _at_expert
from mergekit_wp.merging.interface import settings_of
from mergekit_wp.models.encoding import encode_prompt
from mergekit_wp.prompts import read_prompts
from mergekit_wp.prompts.location import Location
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.lm_eval import LmEvalTask
from tests.models import make_model, perturbed, save, write_prompts

torch.set_num_threads(1)
OWN = Checkers.load(None)


def read(path: Path, **item: Any) -> JsonlTask:
    path.write_text(json.dumps({"prompt": "ab", "split": "test", **item}) + "\n")
    return JsonlTask.read(path, OWN)


@pytest.mark.parametrize(
    ("checker", "answer", "right", "wrong"),
    [
        ("exact", ["201", "0201"], ["201", " 0201\n"], ["['201', '0201']", "2", ""]),
        ("contains", ["Paris", "Lutetia"], ["in Lutetia.", "Paris"], ["Rome", "["]),
        ("exact", 42, ["42"], ["42.0"]),
        ("number", "2,125", ["so 2125", "2,125"], ["2", "125"]),
        ("number", "It is 3 * 6.\n#### 18", ["18", "3 and 18.0"], ["18 and 3"]),
        ("number", ["-0.5", 7], ["-0.5", "it is 7"], ["0.5"]),
    ],
)
def test_answers_as_datasets_hold_them(
    tmp_path: Path, checker: str, answer: Any, right: list[str], wrong: list[str]
) -> None:
    (item,) = read(tmp_path / "t.jsonl", checker=checker, answer=answer).items
    assert [OWN.judge(item, output) for output in right] == [1.0] * len(right)
    assert [OWN.judge(item, output) for output in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ({"answer": {"value": "a"}}, "'answer'"),
        ({"answer": True}, "'answer' holds true"),
        ({"answer": None}, "'answer' holds null"),
        ({"answer": []}, "'answer' is an empty list"),
        (
            {"answer": ["b", ""], "checker": "contains"},
            "'answer' is empty, which every",
        ),
        ({"answer": ["a", ["b"]]}, "'answer' holds"),
        ({"answer": "many", "checker": "number"}, "'answer' is 'many'"),
        ({"answer": "1,5", "checker": "number"}, "'answer' is '1,5'"),
        ({"answer": "nan", "checker": "number"}, "'answer'"),
        ({"pattern": "(a", "checker": "regex"}, "'pattern' is '(a'"),
        ({"pattern": 3, "checker": "regex"}, "'pattern'"),
        ({"instruction_id_list": "title", "checker": "ifeval"}, "'instruction_id_list'"),
        ({"instruction_id_list": ["no:such"], "checker": "ifeval"}, "no:such"),
        ({"answer": "a", "checker": ["exact"]}, "unknown checker"),
        ({"answer": "a", "id": ["x"]}, "'id'"),
        ({"answer": "a", "max_new_tokens": True}, "'max_new_tokens'"),
    ],
)
def test_items_that_cannot_be_used_are_refused_with_line_and_key(
    tmp_path: Path, item: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path / "t.jsonl", **item)
    assert "line 1" in str(raised.value) and key in str(raised.value)


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m.content is defined %}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% else %}null{% endif %}{% else %}absent{% endif %}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(
        save(make_model("llama-tied"), tmp_path_factory.mktemp("m"))
    )


@pytest.mark.parametrize(
    "message",
    [
        CALL,
        CALL | {"content": None},
        CALL | {"content": ""},
        {"role": "user", "content": [{"type": "text", "text": "abca"}]},
    ],
)
def test_messages_are_rendered_as_transformers_renders_them(
    tokenizer: Any, tmp_path: Path, message: dict[str, Any]
) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "ab"}, message]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": messages}))
    (prompt,) = read_prompts(tmp_path / "p.jsonl", None).prompts
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    want = tokenizer(rendered, add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, prompt.prompt) == want


def test_messages_that_cannot_be_read_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for message in ({"role": "user", "content": 3}, {"role": "user", "content": ["a"]}):
        path.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}, message]}))
        with pytest.raises(UserError, match=r"line 1: prompt\.messages\.1\.content: .*a text"):
            read_prompts(path, None)
    path.write_text(json.dumps({"prompt": [{"role": "user"}]}))
    with pytest.raises(UserError, match=r"prompt\.messages\.0: .*'content'"):
        read_prompts(path, None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path.write_text(json.dumps({"prompt": [CALL | {"content": [{"type": "text", "text": "a"}]}]}))
    (prompt,) = read_prompts(path, None).prompts
    with pytest.raises(UserError, match="'content' of message 1"):
        encode_prompt(tokenizer, prompt.prompt)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"PK\x03\x04....", "zip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*expected JSONL"):
        read_prompts(path, None)
    with pytest.raises(UserError, match=f"{name}.*expected JSONL"):
        JsonlTask.read(path, OWN)


def test_an_equals_sign_in_an_experts_name() -> None:
    paths = ["runs/lr=2e-5", "runs/epoch=3-step=10", "plain"]
    models = {path.split("/")[-1]: path for path in paths}
    for key, rest, want in (
        ("lr", "2e-5=p.jsonl", ("lr=2e-5", "p.jsonl")),
        ("runs/epoch", "3-step=10=a=b.jsonl", ("runs/epoch=3-step=10", "a=b.jsonl")),
        ("plain", "a=b.jsonl", ("plain", "a=b.jsonl")),
        ("other", "a=b.jsonl", ("other", "a=b.jsonl")),  # refused by its caller
    ):
        assert _at_expert(models, key, Path(rest)) == (want[0], Path(want[1]))


def test_a_comparison_without_scores_says_the_first_reason() -> None:
    rows = (Row("base", "base", failed="no such weights"), Row("ties", "peer", failed="another"))
    with pytest.raises(UserError, match="no such weights"):
        Resampled(Comparison(rows, ("t",), False, "base"))


def test_a_harness_task_that_the_context_has_no_room_for() -> None:
    def task(**stated: int) -> Any:
        config = SimpleNamespace(generation_kwargs=stated)
        inner = SimpleNamespace(config=config, OUTPUT_TYPE="generate_until")
        return LmEvalTask("long", "", inner, "exact_match", None, Location(place="lm-eval:long"))

    model = make_model("llama-tied")
    model.config.max_position_embeddings = 128
    with pytest.raises(UserError, match="'long' lets a model write 256 tokens.*has 128"):
        task().too_long(model, None)
    task(max_gen_toks=16).too_long(model, None)


def test_merges_of_other_shapes_are_not_held_in_the_bases_model() -> None:
    recipe: dict[str, Any] = {"merge_method": "ties", "base_model": "b", "models": [{"model": "e"}]}
    assert keeps_shapes(MergeConfiguration.model_validate(recipe))
    for more in ({"tokenizer": {"source": "union"}}, {"tokenizer_source": "union"}):
        assert not keeps_shapes(MergeConfiguration.model_validate(recipe | more))


BLOCK = """# mine
language: no  # Norwegian
base_model:
- owner/base
# about tags
tags: [a, b]"""


@pytest.mark.parametrize(
    ("value", "again"),
    [
        ("union", "union"),
        ("\n  source: union", "{source: union}"),
        ("[a, {b: 1}]", "\n- a\n- b: 1"),
        ("&one [1]", "*one"),
    ],
)
def test_a_key_may_say_one_thing_twice(value: str, again: str) -> None:
    """A setting that a written recipe kept, and that its user adds as before."""
    text = f"tokenizer: {value}\nother: 1\ntokenizer: {again}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: '1'",
        "a: {b: 1}\na: {b: 2}",
        "a: {b: 1}\na: {b: 1, c: 1}",
        "a: [1, 2]\na: [2, 1]",
        "a: []\na: {}",
        "- x: {a: 1, a: 2}",
    ],
)
def test_a_key_of_two_values_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="key 'a' stands twice, with different values, .* line 1"):
        parse_yaml(text)


def test_a_recipe_keeps_settings_that_are_mergekits_defaults() -> None:
    stated = {"tokenizer": {"source": "union"}, "dtype": "float32"}
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], **stated}
    assert settings_of(MergeConfiguration.model_validate(recipe)) == stated


def test_front_matter_keeps_every_other_line() -> None:
    written = with_keys(BLOCK, {"base_model": ["owner/base", "o/x"], "license": "mit"})
    assert written.splitlines() == [
        "# mine",
        "language: no  # Norwegian",
        "base_model:",
        "- owner/base",
        "- o/x",
        "# about tags",
        "tags: [a, b]",
        "license: mit",
    ]
    assert "base_model" not in yaml.safe_load(with_keys(BLOCK, {"base_model": None}))
    assert with_keys("", {"a": 1}) == "a: 1" and with_keys(BLOCK, {}) == BLOCK
    with pytest.raises(ValueError, match="a line"):
        with_keys("{a: 1}", {"b": 2})


WITHOUT_UNIX = """
import sys
import psutil  # its Linux part needs what Windows lacks
sys.modules["fcntl"] = sys.modules["resource"] = None
from mergekit_wp.cli import main
main(sys.argv[1:])
"""


def without_unix(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.slow
def test_score_and_merge_without_what_only_unix_has(tmp_path: Path) -> None:
    base = make_model("llama-tied")
    save(base, tmp_path / "base")
    save(perturbed(base), tmp_path / "模型")
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    file, recipe, out = tmp_path / "s.safetensors", tmp_path / "r.yml", tmp_path / "out"
    done = without_unix(
        "score", tmp_path / "base", tmp_path / "模型", "--prompts", prompts, "--out", file
    )
    assert done.returncode == 0, done.stderr
    model = {"model": str(tmp_path / "模型"), "parameters": {"scores": str(file)}}
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "weight_patching",
                "base_model": str(tmp_path / "base"),
                "models": [model],
                "dtype": "float32",
            }
        )
    )
    done = without_unix("merge", recipe, out)
    assert done.returncode == 0, done.stderr
    want = tmp_path / "want"
    CliRunner().invoke(cli, ["merge", str(recipe), str(want)], catch_exceptions=False)
    found, expected = load_file(out / "model.safetensors"), load_file(want / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shown = subprocess.run(
        [sys.executable, "-m", "mergekit_wp.cli", "inspect", str(file), "--top", "2"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert shown.returncode == 0 and b"??" in shown.stdout, shown.stderr


def test_a_reader_that_has_gone_ends_no_command() -> None:
    """As `| head -1` leaves: what was asked for is done, and the status is that of the command."""
    reader, writer = os.pipe()
    os.close(reader)
    for arguments, status in ((["behaviors", "capitals"], 0), (["--no-such"], 2)):
        command = [sys.executable, "-m", "mergekit_wp.cli", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        assert done.returncode == status and "Broken" not in done.stderr, done.stderr
    os.close(writer)
