"""Tasks of lm-eval: local data, a toy model, the harness's own scoring."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_wp.errors import UserError
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.memory import UNBOUNDED, AtOnce
from mergekit_wp.prompts import read_prompts
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask, answers
from mergekit_wp.tasks.lm_eval import LmEvalTask

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"pip install 'mergekit-wp\[eval\]'"):
        LmEvalTask.load("gsm8k")


@pytest.fixture
def world(tmp_path: Path):
    from tests.models import make_model, save

    model = make_model("llama-tied", seed=5)
    save(model, tmp_path / "model")
    asked = TextInterface.read(tmp_path / "model", "model")
    prompts = ["abc", "bcd", "hgf", "kk", "za"]
    right = [text for text, _ in answers(model, asked, prompts, [4] * 5)]
    for split, chosen in (("valid", range(2)), ("test", range(1, 5))):
        docs = [
            {
                "q": prompts[i],
                "a": right[i] if i % 2 else "no",
                "choices": ["a", "b"],
                "gold": i % 2,
            }
            for i in chosen
        ]
        (tmp_path / f"{split}.json").write_text("".join(json.dumps(d) + "\n" for d in docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                "validation": str(tmp_path / "valid.json"),
                "test": str(tmp_path / "test.json"),
            }
        },
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    generate = common | {
        "task": "toy_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 4, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "higher_is_better": True}],
    }
    choose = common | {
        "task": "toy_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "higher_is_better": True}],
    }
    for task in (generate, choose):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path, model.float(), asked


@needs_lm_eval
@pytest.mark.slow
def test_splits_and_scores_are_the_harness_own(world) -> None:
    folder, model, asked = world
    task = LmEvalTask.load(str(folder / "toy_generate.yaml"))
    assert (task.name, task.count("valid"), task.count("test")) == ("toy_generate", 2, 4)
    assert [x.score for x in task.evaluate(model, asked, "valid")] == [0, 1]
    assert [x.score for x in task.evaluate(model, asked, "test")] == [1, 0, 1, 0]
    assert [x.item for x in task.evaluate(model, asked, "test")] == ["0", "1", "2", "3"]
    assert [task.question(item) for item in "0123"] == ["bcd", "hgf", "kk", "za"]


@needs_lm_eval
@pytest.mark.slow
def test_other_documents_than_the_task_itself_takes(world) -> None:
    folder, model, asked = world
    path = folder / "toy_generate.yaml"
    whole = {x.item: x.score for x in LmEvalTask.load(str(path)).evaluate(model, asked, "test")}
    other = LmEvalTask.load(f"{path}?split=test")
    assert [other.count(split) for split in ("valid", "test")] == [4, 4]
    assert {x.item: x.score for x in other.evaluate(model, asked, "valid")} == whole
    some = LmEvalTask.load(f"{path}?sample=2&seed=3")
    chosen = sorted(random.Random(3).sample(range(4), 2))
    assert some.count("test") == 2 and some.count("valid") == 2, "of two there are two"
    found = {x.item: x.score for x in some.evaluate(model, asked, "test")}
    assert found == {str(i): whole[str(i)] for i in chosen}
    prints = {task.fingerprint for task in (other, some, LmEvalTask.load(str(path)))}
    assert len(prints) == 3
    with pytest.raises(UserError, match="has no documents 'tes'; its dataset has test, validation"):
        LmEvalTask.load(f"{path}?split=tes")
    with pytest.raises(UserError, match="'split' says on which documents a task is evaluated"):
        read_prompts(Path(f"{path}?split=test"), None)


@needs_lm_eval
@pytest.mark.slow
def test_code_that_models_write_is_run_where_that_is_allowed(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, asked = world
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    task = yaml.safe_load((folder / "toy_generate.yaml").read_text())
    path = folder / "toy_code.yaml"
    path.write_text(yaml.safe_dump(task | {"task": "toy_code", "unsafe_code": True}))
    with pytest.raises(UserError, match="'toy_code' runs code .* HF_ALLOW_CODE_EVAL=1"):
        LmEvalTask.load(str(path))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    found = LmEvalTask.load(str(path)).evaluate(model, asked, "test")
    assert [x.score for x in found] == [1, 0, 1, 0]


@needs_lm_eval
@pytest.mark.slow
def test_a_metric_may_be_a_function(world) -> None:
    """As those of HumanEval and MBPP are; it may name its results itself."""
    folder, model, asked = world
    (folder / "own.py").write_text(
        "def named(references, predictions):\n"
        "    return {'right': float(references[0] == predictions[0])}\n"
        "def plain(references, predictions):\n"
        "    return float(references[0] == predictions[0])\n"
    )
    text = (folder / "toy_generate.yaml").read_text()
    for name in ("named", "plain"):
        path = folder / f"toy_{name}.yaml"
        text_of = text.replace(
            "metric: exact_match", f"metric: !function own.{name}\n  aggregation: mean"
        )
        path.write_text(text_of.replace("task: toy_generate", f"task: toy_{name}"))
        found = LmEvalTask.load(str(path)).evaluate(model, asked, "test")
        assert [x.score for x in found] == [1, 0, 1, 0]


@needs_lm_eval
@pytest.mark.slow
def test_every_end_token_of_the_model_ends_an_answer(world) -> None:
    folder, model, asked = world
    task = LmEvalTask.load(str(folder / "toy_generate.yaml"))
    prompts = ["bcd", "hgf", "kk", "za"]
    letter = next(c for text, _ in answers(model, asked, prompts, [4] * 4) for c in text[1:])
    ends = (*asked.ends, asked.tokenizer.convert_tokens_to_ids(letter))
    other = TextInterface(asked.tokenizer, ends)
    want = [text.partition(letter)[0] for text, _ in answers(model, asked, prompts, [4] * 4)]
    found = [x.output for x in task.evaluate(model, other, "test")]
    assert [text.count(letter) <= 1 for text in found] == [True] * 4
    assert [text.strip("[']").partition(letter)[0] for text in found] == want
    assert found != [x.output for x in task.evaluate(model, asked, "test")]


@needs_lm_eval
@pytest.mark.slow
def test_little_memory_changes_no_score(world) -> None:
    folder, model, asked = world
    task = LmEvalTask.load(str(folder / "toy_generate.yaml"))

    def refuse(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    whole, notes = task.evaluate(model, asked, "test"), []
    model.model.layers[0].register_forward_pre_hook(refuse)
    at_once = AtOnce(UNBOUNDED, notes.append)
    assert task.evaluate(model, asked, "test", at_once) == whole
    assert task.evaluate(model, asked, "test", at_once) == whole
    assert at_once.size == 2 and len(notes) == 2, "8, 4, 2; then 2"


@needs_lm_eval
@pytest.mark.slow
def test_multiple_choice_takes_the_likelier(world) -> None:
    folder, model, asked = world
    task = LmEvalTask.load(str(folder / "toy_choose.yaml"))
    found = [x.score for x in task.evaluate(model, asked, "test")]
    want = []
    for line in (folder / "test.json").read_text().splitlines():
        doc = json.loads(line)
        logits = model(torch.tensor([asked.tokenizer(doc["q"]).input_ids])).logits[0, -1]
        a, b = (float(logits[asked.tokenizer(c).input_ids[0]]) for c in doc["choices"])
        want.append(float((b > a) == bool(doc["gold"])))
    assert found == want and len(want) == 4


@needs_lm_eval
@pytest.mark.slow
def test_bad_tasks(world) -> None:
    folder, _, _ = world
    with pytest.raises(UserError, match="lm-eval has no task 'gsm8kk'; did you mean gsm8k"):
        LmEvalTask.load("gsm8kk")
    with pytest.raises(UserError, match="none.yaml not found"):
        LmEvalTask.load(str(folder / "none.yaml"))
    (folder / "nameless.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="nameless.yaml has no 'task' name"):
        LmEvalTask.load(str(folder / "nameless.yaml"))
    data = yaml.safe_load((folder / "toy_generate.yaml").read_text())
    del data["validation_split"]
    (folder / "toy_generate.yaml").write_text(yaml.safe_dump(data))
    assert LmEvalTask.load(str(folder / "toy_generate.yaml")).count("valid") == 0
    data["metric_list"][0]["higher_is_better"] = False
    (folder / "toy_generate.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="exact_match, is better when lower"):
        LmEvalTask.load(str(folder / "toy_generate.yaml"))
    data["dataset_kwargs"]["data_files"]["test"] = str(folder / "gone.json")
    (folder / "toy_generate.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="cannot be loaded"):
        LmEvalTask.load(str(folder / "toy_generate.yaml"))


def test_jsonl_is_never_looked_up_in_the_harness(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        JsonlTask.read(tmp_path / "x.jsonl", Checkers.load(None))
