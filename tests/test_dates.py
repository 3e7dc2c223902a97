"""A chat template that tells today's date tells that of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_wp.cli import cli
from mergekit_wp.comparison.results import Results
from mergekit_wp.errors import UserError
from mergekit_wp.files import circuitfile, scorefile
from mergekit_wp.runs.journal import Journal
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score
from mergekit_wp.tasks.items import JsonlTask
from tests.models import make_model, perturbed, save, write_prompts
from tests.test_resume import kill_after_one_block
from tests.test_scoring import Quiet

torch.set_num_threads(1)

BEFORE, AFTER = "1700000000", "1700100000"  # 14 and 16 November 2023
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tell(folder: Path, template: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", BEFORE)
    base = make_model("llama-tied")
    experts = {"expert": perturbed(base), "other": perturbed(base, seed=2)}
    for name, model in {"base": base, **experts}.items():
        tell(save(model, tmp_path / name), "{{ strftime_now('%d') }}" + TEMPLATE)
    write_prompts(tmp_path / "p.jsonl", 3)
    item = {"prompt": "abc", "answer": "a", "split": "test", "checker": "contains"}
    (tmp_path / "t.jsonl").write_text(json.dumps(item) + "\n")
    recipe = {"merge_method": "ties", "base_model": "base",
              "models": [{"model": name} for name in experts]}  # fmt: skip
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    return tmp_path


#: and the folder
TOGETHER = (
    "fit", "r.yml", "--steps", "2", "--unguarded", "--max-new-tokens", "2",
    "--prompts", "expert=p.jsonl", "--prompts", "other=p.jsonl", "--out",
)  # fmt: skip


def request(out: str) -> ScoreRequest:
    return ScoreRequest(
        base="base", expert="expert", prompts=Path("p.jsonl"), out=Path(out), max_new_tokens=2,
        estimand=("share", "gain", "activation_gain"), share_steps=1, batch_size=2,
        dtype="float64",
    )  # fmt: skip


def call(*arguments: str) -> str:
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exception is None, done.output
    return done.stdout


def test_a_run_killed_before_midnight_goes_on_after_it(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(request("whole.safetensors"), Quiet())
    kill_after_one_block(request("cut.safetensors"), monkeypatch)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", AFTER)
    score(request("cut.safetensors"), Quiet())
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    # what begins today tells today
    score(request("today.safetensors"), Quiet())
    first, second = (
        scorefile.read(Path(f"{name}.safetensors")).manifest for name in ("whole", "today")
    )
    assert (first.template_date, second.template_date) == ("2023-11-14", "2023-11-16")
    assert first.scale != second.scale
    kill_after_one_block(request("anew.safetensors"), monkeypatch)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", BEFORE)
    score(request("anew.safetensors").model_copy(update={"restart": True}), Quiet())
    assert scorefile.read(Path("anew.safetensors")).manifest.template_date == "2023-11-14"


def test_reproduce_tells_the_date(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score(request("s.safetensors"), Quiet())
    scored = Path("s.safetensors").read_bytes()
    verify = ("verify", "s.safetensors", "--top", "2", "--prompts", "p.jsonl", "--task", "t.jsonl",
              "--draws", "2", "--max-new-tokens", "2")  # fmt: skip
    trace = ("trace", "s.safetensors", "--prompts", "p.jsonl", "--targets", "1", "--suppliers",
             "1", "--max-new-tokens", "2", "--out", "t.json")  # fmt: skip
    call(*trace)
    traced = Path("t.json").read_bytes()
    call(*verify)
    verified = Path("s.safetensors").read_bytes()
    assert circuitfile.read(Path("t.json")).template_date == "2023-11-14"
    shown = "".join(call("reproduce", file) for file in ("s.safetensors", "t.json"))
    lines = shown.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("SOURCE_DATE_EPOCH=1699920000 ") for line in lines)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1699920000")
    for path in ("s.safetensors", "t.json"):
        Path(path).unlink()
    score(request("s.safetensors"), Quiet())
    assert Path("s.safetensors").read_bytes() == scored
    call(*trace)
    call(*verify)
    assert Path("t.json").read_bytes() == traced
    assert Path("s.safetensors").read_bytes() == verified


def test_where_no_date_is_told_none_is_kept(world: Path) -> None:
    for name in ("base", "expert"):
        tell(world / name, TEMPLATE)
    score(request("s.safetensors"), Quiet())
    assert "template_date" not in scorefile.read(Path("s.safetensors")).manifest.model_dump()
    assert b"template_date" not in Path("s.safetensors").read_bytes()


def test_a_date_that_is_none_is_refused(world: Path) -> None:
    score(request("s.safetensors"), Quiet())
    call("trace", "s.safetensors", "--prompts", "p.jsonl", "--targets", "1", "--suppliers", "1",
         "--max-new-tokens", "2", "--out", "t.json")  # fmt: skip
    text = Path("t.json").read_text()
    Path("t.json").write_text(text.replace('"2023-11-14"', '"; rm -r ~"'))
    refused = CliRunner().invoke(cli, ["reproduce", "t.json"])
    assert isinstance(refused.exception, UserError)
    assert "is no date" in str(refused.exception)


def test_all_experts_of_a_fit_are_told_one_date(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*TOGETHER, "whole")
    original = Journal.save

    def die(self: Journal, key: str, tensors: Any) -> None:
        original(self, key, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", die)
        assert CliRunner().invoke(cli, [*TOGETHER, "cut"]).exit_code
    monkeypatch.setenv("SOURCE_DATE_EPOCH", AFTER)
    call(*TOGETHER, "cut")
    for name in ("expert", "other"):
        whole, cut = (load_file(f"{folder}/{name}.safetensors") for folder in ("whole", "cut"))
        assert all(torch.equal(cut[key], value) for key, value in whole.items())
        manifest = scorefile.read(Path(f"cut/{name}.safetensors")).manifest
        assert manifest.template_date == manifest.created == "2023-11-14"


def test_a_comparison_goes_on_at_its_date(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(*TOGETHER, "s")
    command = ("compare", "s/recipe.yml", "--task", "t.jsonl", "--untuned", "--methods", "linear")
    call(*command, "--out", "whole")
    whole = Path("whole/results.jsonl").read_text()
    stated = json.loads(Path("whole/comparison.json").read_text())
    assert stated["template date"] == "2023-11-14"
    original, calls = JsonlTask.evaluate, []

    def die(self: JsonlTask, *given: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTask, "evaluate", die)
        assert CliRunner().invoke(cli, [*command, "--out", "cut"]).exit_code
    monkeypatch.setenv("SOURCE_DATE_EPOCH", AFTER)
    call(*command, "--out", "cut")
    assert Path("cut/results.jsonl").read_text() == whole
    for name in ("base", "expert", "other"):
        tell(world / name, TEMPLATE)
    call(*command, "--out", "plain")
    assert "template date" not in json.loads(Path("plain/comparison.json").read_text())
    Path("cut/comparison.json").write_text(json.dumps(stated | {"template date": "soon"}))
    with pytest.raises(UserError, match=r"comparison\.json is damaged"), Results(Path("cut"), {}):
        pass
