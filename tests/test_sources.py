"""Prompts and items from what people have: every form, what is recognised, what is refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
import yaml
from click.testing import CliRunner
from pyarrow import parquet

from mergekit_wp.cli import cli
from mergekit_wp.errors import UserError
from mergekit_wp.prompts import prompt_source, read_prompts
from mergekit_wp.prompts.harness import load_task
from mergekit_wp.prompts.location import Location
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from mergekit_wp.tasks.lm_eval import LmEvalTask
from mergekit_wp.tasks.load import Loading

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")

QA = [{"question": "2+2?", "answer": "4"}, {"question": "3+3, in\nwords?", "answer": 'it is "six"'}]
ALPACA = [
    {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
MESSAGES = [{"messages": [*CHAT, {"role": "assistant", "content": "Yo"}]}, {"messages": CHAT}]
SHAREGPT = [
    {
        "id": "x1",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Yo"},
        ],
    }
]
IFEVAL = [
    {
        "key": 1000,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
]

#: by hand: what each shape says, as prompt, response
QA_READ = [("2+2?", "4"), ("3+3, in\nwords?", 'it is "six"')]
ALPACA_READ = [("Sort.\n\n3 1 2", "1 2 3"), ("Greet.", "Hello")]
CHAT_READ = (CHAT, "Yo")
CHATS_READ = [CHAT_READ, (CHAT, None)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    """By hand, not by `csv`: every cell in quotes, quotes doubled."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = [delimiter.join('"' + c.replace('"', '""') + '"' for c in line) for line in lines]
    return "\r\n".join(cells).encode()


def parquet_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


FORMS: dict[str, tuple[Callable[[Path], Path], list[tuple[Any, Any]]]] = {
    "Alpaca": (lambda d: put(d / "a.json", json.dumps(ALPACA, indent=1).encode()), ALPACA_READ),
    "ShareGPT JSON": (lambda d: put(d / "s.json", json.dumps(SHAREGPT).encode()), [CHAT_READ]),
    "GSM8K Parquet": (lambda d: parquet_file(d / "test-00000.parquet", QA), QA_READ),
    "CSV": (lambda d: put(d / "q.csv", table(QA, ",")), QA_READ),
    "CSV from Excel": (lambda d: put(d / "q.CSV", b"\xef\xbb\xbf" + table(QA, ",")), QA_READ),
    "TSV": (lambda d: put(d / "q.tsv", table(QA, "\t")), QA_READ),
    "text": (lambda d: put(d / "p.txt", b"one\r\n\r\n  two\n"), [("one", None), ("  two", None)]),
    "JSONL, gzipped": (lambda d: put(d / "q.jsonl.gz", gzip.compress(jsonl(QA))), QA_READ),
    "CSV, gzipped": (lambda d: put(d / "q.csv.gz", gzip.compress(table(QA, ","))), QA_READ),
    "messages": (lambda d: put(d / "m.jsonl", jsonl(MESSAGES)), CHATS_READ),
    "messages in Parquet": (lambda d: parquet_file(d / "m.parquet", MESSAGES), CHATS_READ),
    "IFEval": (lambda d: put(d / "i.jsonl", jsonl(IFEVAL)), [("Write without commas.", None)]),
    "BOM": (lambda d: put(d / "b.jsonl", b"\xef\xbb\xbf" + jsonl(QA)), QA_READ),
    "saved dataset": (lambda d: saved(d / "saved", QA), QA_READ),
    "array of texts": (lambda d: put(d / "t.json", b'["a", "b"]'), [("a", None), ("b", None)]),
}  # fmt: skip


def said(prompts: Any) -> list[tuple[Any, Any]]:
    plain = [prompt.model_dump(exclude_none=True) for prompt in prompts]
    return [(prompt["prompt"], prompt.get("response")) for prompt in plain]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    make, want = FORMS[form]
    found = read_prompts(make(tmp_path), None)
    assert said(found.prompts) == want
    assert f": {len(want)} from " in found.said


def test_a_hash_is_of_prompts_whatever_they_are_kept_in(tmp_path: Path) -> None:
    kept = ("GSM8K Parquet", "CSV", "TSV", "JSONL, gzipped", "BOM", "saved dataset")
    hashes = {read_prompts(FORMS[form][0](tmp_path), None).sha256 for form in kept}
    assert hashes == {read_prompts(prompt_source(QA), None).sha256}


def test_one_line_says_what_was_taken_and_why_not(tmp_path: Path) -> None:
    turn = {"from": "tool", "value": "x"}
    rows = [
        *SHAREGPT * 2,
        {"conversations": [turn]},
        {"conversations": []},
        {"conversations": None},
        {"conversations": SHAREGPT[0]["conversations"][2:]},
        {"id": "y"},
    ]
    path = put(tmp_path / "s.json", json.dumps(rows).encode())
    assert read_prompts(path, None).said == (
        f"prompt file {path}: 2 from a JSON array, chats (ShareGPT) (conversations), not read: id; "
        "5 skipped: 1 with a message from 'tool', 2 without a prompt, 1 that begin with an answer, "
        f"1 without 'conversations'; 1 repeat another ('{path}?distinct=yes' leaves them out)"
    )
    distinct = read_prompts(Path(f"{path}?distinct=yes"), None)
    assert len(distinct.prompts) == 1 and "1 that came before" in distinct.said


def test_fields_by_name(tmp_path: Path) -> None:
    rows = [{"text": "a", "short": "b", "label": "c"}, {"text": "d", "short": None, "label": "e"}]
    path = put(tmp_path / "own.jsonl", jsonl(rows))
    read = read_prompts(Path(f"{path}?prompt=text&response=label&contrast=short"), None).prompts
    assert [(p.prompt, p.contrast, p.response) for p in read] == [("a", "b", "c"), ("d", None, "e")]
    path = put(tmp_path / "odd name.csv", b"my prompt,b&c\nx,y\n")
    (read_,) = read_prompts(Path(f"{path}?prompt=my prompt&response=b%26c"), None).prompts
    assert (read_.prompt, read_.response) == ("x", "y")
    qa = put(tmp_path / "q.jsonl", jsonl(QA))
    assert said(read_prompts(Path(f"{qa}?response="), None).prompts) == [
        (prompt, None) for prompt, _ in QA_READ
    ]
    both = put(tmp_path / "u.jsonl", jsonl([{"prompt": "Hi"} | MESSAGES[0]]))
    assert said(read_prompts(Path(f"{both}?prompt=messages"), None).prompts) == [CHAT_READ]
    assert said(read_prompts(Path(f"{both}?prompt=prompt"), None).prompts) == [("Hi", None)]


def test_samples_are_drawn_by_a_seed(tmp_path: Path) -> None:
    path = put(tmp_path / "n.txt", "".join(f"{i}\n" for i in range(50)).encode())
    one = read_prompts(Path(f"{path}?sample=5&seed=3"), None)
    want = sorted(random.Random(3).sample(range(50), 5))
    assert [p.prompt for p in one.prompts] == [str(i) for i in want]
    assert "5 from plain text" in one.said and "drawn from 50 by seed 3" in one.said
    assert len(read_prompts(Path(f"{path}?sample=60"), None).prompts) == 50
    limited = read_prompts(Path(f"{path}?sample=5&seed=3"), 2)
    assert limited.prompts == one.prompts[:2] and limited.sha256 == one.sha256
    assert "the first 2 are used" in limited.said


def test_a_spelling_is_taken_apart_and_written_again(tmp_path: Path) -> None:
    text = (
        "hf:me/data?prompt=a%26b&config=c&split=train[:10]+test&revision=v1&sample=3&distinct=yes"
    )
    source = Location.parse(text)
    assert (source.prompt, source.split) == ("a&b", "train[:10]+test")
    assert source.but() == text
    assert Location.parse(source.but(seed=4)) == source.model_copy(update={"seed": 4})
    real = put(tmp_path / "what?prompt=x.jsonl", b'{"prompt": "a"}')
    assert said(read_prompts(real, None).prompts) == [("a", None)]


class Hub:
    """Stands in for the Hub: one dataset, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: list[str]) -> None:
        self.asked: list[Any] = []
        self.splits = splits
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.names)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def load(self, name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        self.asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(QA)

    def names(self, _name: str, _config: str | None, revision: str | None) -> list[str]:
        return self.splits

    def dataset_info(self, _name: str, revision: str | None) -> Any:
        return SimpleNamespace(sha="c0ffee" if revision is None else f"commit-of-{revision}")


def test_a_dataset_of_the_hub_by_config_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, ["train"])
    found = read_prompts(Path("hf:openai/gsm8k?config=main&split=test&revision=v2"), None)
    assert said(found.prompts) == QA_READ and found.name == "gsm8k"
    assert read_prompts(Path("hf:openai/gsm8k"), None).sha256 == found.sha256
    assert hub.asked == [
        ("openai/gsm8k", "main", "test", "v2"),
        ("openai/gsm8k", None, "train", None),
    ]
    hub.splits = ["train", "test"]
    with pytest.raises(UserError, match=r"splits train, test; name one: hf:me/d\?split=train$"):
        read_prompts(Path("hf:me/d"), None)


def test_a_dataset_is_kept_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_wp.joint.request import by_name

    Hub(monkeypatch, ["train"])
    pinned = Path("hf:me/d?split=train&revision=c0ffee")
    assert prompt_source("hf:me/d?split=train") == pinned
    assert prompt_source(Path("hf:me/d?revision=v1")) == Path("hf:me/d?revision=commit-of-v1")
    assert by_name(["a=hf:me/d?split=train", "b=b.jsonl"]) == (f"a={pinned}", "b=b.jsonl")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=offline))
    assert prompt_source("hf:me/d?split=train") == Path("hf:me/d?split=train")


def offline(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as refused:
        read_prompts(Path("hf:me/d?split=train"), None)
    assert str(refused.value) == (
        "prompt source hf:me/d cannot be read: Config name is missing. Please pick one among: "
        "['main', 'socratic']; name one: hf:me/d?config=NAME&split=train"
    )


def test_folders_with_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([row]) for name, row in zip("ab", QA, strict=True)}
    )
    both.save_to_disk(str(tmp_path / "both"))
    folder = tmp_path / "both"
    assert said(read_prompts(Path(f"{folder}?split=b"), None).prompts) == QA_READ[1:]
    with pytest.raises(UserError, match=r"splits a, b; name one: .*both\?split=a"):
        read_prompts(folder, None)
    with pytest.raises(UserError, match="no split 'c'; it has a, b"):
        read_prompts(Path(f"{folder}?split=c"), None)
    one = saved(tmp_path / "one", QA)
    with pytest.raises(UserError, match="without splits"):
        read_prompts(Path(f"{one}?split=train"), None)
    with pytest.raises(UserError, match="none that datasets' save_to_disk has written"):
        read_prompts(tmp_path, None)


def test_a_compressed_file_is_unpacked_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "p.txt.gz", gzip.compress(b"a\n" * 512))
    monkeypatch.setattr("mergekit_wp.prompts.records._MOST", 1024)
    assert len(read_prompts(path, None).prompts) == 512
    monkeypatch.setattr("mergekit_wp.prompts.records._MOST", 1023)
    with pytest.raises(UserError, match=r"p\.txt\.gz unpacks to more than 0 MiB"):
        read_prompts(path, None)


def test_a_name_without_ending_is_told_what_it_may_mean() -> None:
    with pytest.raises(UserError, match=r"Hub is hf:OWNER/NAME, a task of lm-eval lm-eval:NAME"):
        read_prompts(Path("openai/gsm8k"), None)


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "no field known": ("p.csv", b"a,b\n1,2\n", r"fields a, b, .*p\.csv\?prompt=FIELD&response=FI"),
    "two shapes": (
        "p.jsonl", jsonl([{"prompt": "Hi"} | MESSAGES[0]]),
        r"prompts or chats; .*p\.jsonl\?prompt=prompt' or '.*p\.jsonl\?prompt=messages'",
    ),
    "a shape on each line": ("p.jsonl", jsonl([{"prompt": "a"}, QA[0]]), "prompts or questions"),
    "a field less": ("p.jsonl", jsonl([{"question": "a", "context": "b"}]), "prompt=FIELD"),
    "empty": ("p.csv", b"", "holds no prompts"),
    "a header alone": ("p.csv", b"prompt\n", "holds no prompts"),
    "nothing left": ("p.tsv", b"prompt\tresponse\n\tx\n", r"no prompts.*1 skipped: 1 without a pr"),
    "an answer that is no text": (
        "p.jsonl", jsonl([{"question": "a", "answer": 2}]), r"line 1: response: .*\?response=' lea",
    ),
    "a short row": ("p.csv", b"prompt,response\na\n", "line 2: 1 cells under a header of 2"),
    "a header twice": ("p.csv", b"a,a\n1,2\n", "line 1: .*each another; it has 'a', 'a'"),
    "an open quote": ("p.csv", b'prompt\n"a\n', r"line 2: "),
    "not UTF-8": ("p.csv", b"prompt\n\xe9t\xe9\n", "cannot be read: 'utf-8' codec"),
    "half a gzip": ("p.jsonl.gz", gzip.compress(b"x" * 999)[:20], "cannot be read: "),
    "no Parquet": ("p.parquet", b"PAR1....", "Parquet file that cannot be read: "),
    "half an array": ("p.json", b'[{"prompt": "a"},', "not JSON"),
    "array of numbers": ("p.json", b"[1]", "record 1: expected an object"),
    "text without its ending": ("p", b"Say hello\n", r"line 1: not JSON .*ends in \.txt"),
    "a line without a prompt": ("p.jsonl", b'{"prompt": "a"}\n{"x": 1}\n', "line 2: prompt: Field"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, why: str) -> None:
    name, content, message = REFUSED[why]
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(put(tmp_path / name, content), None)
    assert "\n" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("prompt=x", r"no field 'x', named by 'prompt='; it has question, answer"),
        ("promt=x", r"'promt=x' cannot be read; expected .* of prompt, response, contrast, config"),
        ("split=train", r"'split' says nothing of a file; leave it out .*hf:owner/name"),
        ("sample=no", r"sample: .*integer"),
        ("sample=0", r"sample: .*greater than or equal to 1"),
        ("prompt=question&prompt=answer", "each key once"),
        ("checker=exact", "'checker' is for items"),
    ],
)
def test_a_bad_spelling_is_named(tmp_path: Path, query: str, message: str) -> None:
    path = put(tmp_path / "q.jsonl", jsonl(QA))
    with pytest.raises(UserError, match=message):
        read_prompts(Path(f"{path}?{query}"), None)


def test_shapes_in_memory() -> None:
    for rows, want in ((QA, QA_READ), (ALPACA, ALPACA_READ), (SHAREGPT, [CHAT_READ])):
        assert said(prompt_source(rows)) == want
        assert said(prompt_source(datasets.Dataset.from_list(rows))) == want
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    chats = datasets.Dataset.from_list([{"prompt": [*CHAT, call]}])
    assert said(prompt_source(chats)) == [([*CHAT, call], None)]
    with pytest.raises(UserError, match=r"^prompt 2: it is one without 'answer'"):
        prompt_source([QA[0], {"question": "a"}])
    with pytest.raises(UserError, match=r"given by name \(train\); .*one split of a dataset"):
        prompt_source(datasets.DatasetDict(train=datasets.Dataset.from_list(QA)))
    with pytest.raises(UserError, match="the list of prompts has the fields q"):
        prompt_source([{"q": "a"}])


def test_an_ordinary_file_does_not_pay_for_the_others(tmp_path: Path) -> None:
    path = put(tmp_path / "p.jsonl", b'{"prompt": "a"}\n')
    code = (
        "import sys; from pathlib import Path; from mergekit_wp.prompts import read_prompts\n"
        f"assert len(read_prompts(Path({str(path)!r}), None).prompts) == 1\n"
        "print(*({'datasets', 'pyarrow', 'lm_eval'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_command_shows_and_writes_what_would_be_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", json.dumps(ALPACA).encode())
    out = tmp_path / "out.jsonl"
    shown = CliRunner().invoke(cli, ["prompts", str(path), "--out", str(out)])
    assert shown.exception is None, shown.exception
    assert "2 from a JSON array, instructions (Alpaca) (instruction, input, output)" in shown.output
    assert "1 prompt   Sort. 3 1 2\n1 response 1 2 3\n" in shown.output
    again, first = read_prompts(out, None), read_prompts(path, None)
    assert (again.prompts, again.sha256) == (first.prompts, first.sha256)
    assert again.plain and not first.plain
    wrong = CliRunner().invoke(cli, ["prompts", str(tmp_path / "none.csv")])
    assert "none.csv cannot be read" in str(wrong.exception)


# --- tasks of lm-eval -----------------------------------------------------------------------------


def harness_task(folder: Path, **config: Any) -> Path:
    for split, row in (("train", QA[0]), ("test", QA[1])):
        put(folder / f"{split}.json", jsonl([row]))
    files = {split: str(folder / f"{split}.json") for split in ("train", "test")}
    task = {
        "task": "toy_prompts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "higher_is_better": True}],
        **config,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder / "toy.yaml"


@needs_lm_eval
@pytest.mark.parametrize("other", ["training_split", "fewshot_split"])
def test_a_task_gives_prompts_that_it_is_not_evaluated_on(tmp_path: Path, other: str) -> None:
    found = read_prompts(harness_task(tmp_path, **{other: "train"}), None)
    assert said(found.prompts) == [("Q: 2+2?\nA:", None)]
    assert "1 from lm-eval" in found.said


@needs_lm_eval
@pytest.mark.parametrize("config", [{}, {"training_split": "test"}, {"fewshot_split": "test"}])
def test_a_task_with_nothing_else_is_refused(tmp_path: Path, config: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"no training or few-shot documents .*\('test'\)"):
        read_prompts(harness_task(tmp_path, **config), None)


def test_a_task_by_name_needs_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"'gsm8k' is a task of lm-eval, .*'mergekit-wp\[eval\]'"):
        read_prompts(Path("lm-eval:gsm8k"), None)
    with pytest.raises(UserError, match=r"pip install"):
        load_task("gsm8k")


# --- items ----------------------------------------------------------------------------------------


def test_items_from_any_form(tmp_path: Path) -> None:
    own = Checkers.load(None)
    for form in ("GSM8K Parquet", "CSV", "JSONL, gzipped", "saved dataset"):
        task = JsonlTask.read(FORMS[form][0](tmp_path), own, usual="test")
        assert [(i["prompt"], i["answer"], i["split"]) for i in task.items] == [
            (*read, "test") for read in QA_READ
        ]
    ifeval = parquet_file(
        tmp_path / "i.parquet",
        [IFEVAL[0] | {"kwargs": [{"num_words": None, "relation": None}]}],
    )
    (item,) = JsonlTask.read(ifeval, own, usual="test").items
    assert (item["checker"], item["kwargs"]) == ("ifeval", [{}])
    with pytest.raises(
        UserError, match=r"line 1: 'split' is None; .*untuned=True needs no 'split'"
    ):
        JsonlTask.read(put(tmp_path / "q.jsonl", jsonl(QA)), own)


def test_tasks_of_compare_are_sources_or_of_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, ["train"])
    path = put(tmp_path / "q.csv", table([QA[0]], ","))
    specs = [f"sums={path}?checker=number", "hf:me/d?split=test", f"{path}"]
    loading = Loading(Checkers.load(None), 64, None)
    sums, from_hub, plain = loading.load(specs, "test")
    assert [task.name for task in (sums, from_hub, plain)] == ["sums", "d", "q"]
    assert isinstance(sums, JsonlTask) and sums.items[0]["checker"] == "number"
    assert hub.asked == [("me/d", None, "test", None)]
    with pytest.raises(UserError, match=r"line 2: 'split' is None"):
        loading.load(specs)
    monkeypatch.setattr(LmEvalTask, "load", lambda spec, _batch_size: spec)
    named = ("gsm8k", "lm-eval:gsm8k", "none.yaml")
    assert loading.load(named) == named
    with pytest.raises(UserError, match=r"none\.tsv cannot be read"):
        loading.load(["none.tsv"])
