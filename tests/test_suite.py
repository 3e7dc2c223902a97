"""Suites: read, placed, turned into the fit and the comparison that they ask for, and run."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import mergekit_wp as wp
from mergekit_wp.cli import cli
from mergekit_wp.comparison.methods import peers
from mergekit_wp.comparison.suites.prepare import outlook, prepare
from mergekit_wp.comparison.suites.suite import Suite
from mergekit_wp.errors import UserError
from mergekit_wp.prompts.location import Location
from mergekit_wp.runs.progress import NoProgress, NotesOnly
from mergekit_wp.tasks.checkers import Checkers
from mergekit_wp.tasks.items import JsonlTask
from tests.models import finetuned, make_model, save, write_prompts

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes" / "suites").glob("*.yml"))
INSTALLED = importlib.util.find_spec("lm_eval") is not None
SUITE: dict[str, Any] = {
    "base": "base",
    "experts": {
        "ab": {"model": "east", "prompts": "east.jsonl?response="},
        "dd": {"model": "west", "prompts": "west.jsonl?response="},
    },
    "test": {"ab": ["toy_ab.yaml"], "dd": ["items.jsonl?checker=contains"]},
    "validation": {
        "ab": ["toy_ab.yaml?split=train&sample=3&seed=1"],
        "dd": ["chosen?checker=contains", "more.jsonl?checker=contains"],
    },
    "keep": {"text": ["plain.txt"], "other": ["toy_ab.yaml?split=train"]},
    "guards": ["open.jsonl"],
    "generation": {"max_new_tokens": 3},
    "fit": {"steps": 3, "prompts_a_step": 2, "held_out": 0.0},
    "compare": {"methods": ["weight_patching", "task_arithmetic", "regmean"], "grid": "grid.yml"},
}


def write(folder: Path, **changed: Any) -> Path:
    path = folder / "suite.yml"
    given = {key: value for key, value in (SUITE | changed).items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that always answer one word, local datasets, and a local task of lm-eval."""
    import datasets

    root = tmp_path_factory.mktemp("suite")
    base = make_model("llama-tied")
    save(base, root / "base", torch.float32)
    for name, word in (("east", "ab"), ("west", "dd")):
        prompts = write_prompts(root / f"{name}.jsonl", 6)
        lines = [json.loads(line) | {"response": word} for line in prompts.read_text().splitlines()]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        save(finetuned(base, prompts, steps=60), root / name, torch.float32)
    known = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    write_prompts(root / "open.jsonl", 7)
    (root / "plain.txt").write_text("abc dde fgh " * 30)
    (root / "grid.yml").write_text(
        "task_arithmetic: {weight: [0.5, 1.0]}\nregmean: {off_diagonal: [0.5]}\n"
    )
    asked = [{"prompt": p, "answer": "dd"} for p in known[:4]]
    tested = [{"prompt": p, "answer": "dd", "split": "test"} for p in known[3:]]
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in tested))
    (root / "more.jsonl").write_text(json.dumps(asked[-1]) + "\n")
    datasets.Dataset.from_list(asked[:3]).save_to_disk(str(root / "chosen"))
    for split, some in (("train", known[:4]), ("test", known[1:])):
        docs = [{"q": prompt, "a": "ab"} for prompt in some]
        (root / f"{split}.json").write_text("".join(json.dumps(d) + "\n" for d in docs))
    task = {
        "task": "toy_ab",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(root / f"{split}.json") for split in ("train", "test")}
        },
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 3, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "higher_is_better": True}],
    }
    (root / "toy_ab.yaml").write_text(yaml.safe_dump(task))
    return root


def test_a_suite_is_the_requests_that_it_stands_for(world: Path, tmp_path: Path) -> None:
    suite = Suite.read(write(world))
    east, west = str(world / "east"), str(world / "west")
    fit = suite.fit_request(tmp_path / "experts.yml", tmp_path / "fit", device="cpu")
    assert dict(fit.prompts) == {
        east: Path(f"{world}/east.jsonl?response="),
        west: Path(f"{world}/west.jsonl?response="),
    }
    assert fit.guards == (world / "open.jsonl",)
    assert (fit.steps, fit.held_out, fit.max_new_tokens, fit.device) == (3, 0, 3, "cpu")
    assert suite.recipe == {
        "merge_method": "task_arithmetic",
        "base_model": str(world / "base"),
        "models": [{"model": east}, {"model": west}],
        "dtype": "float32",
    }
    request = suite.compare_request(Path("recipe.yml"), out=tmp_path, methods="ties", device="cpu")
    assert request.recipes == (Path("recipe.yml"),) and request.prompts == fit.prompts
    assert request.tasks == (
        f"ab={world}/toy_ab.yaml",
        f"dd={world}/items.jsonl?checker=contains",
    )
    assert request.validation == (
        f"ab={world}/toy_ab.yaml?split=train&sample=3&seed=1",
        f"dd={world}/chosen?checker=contains",
        f"dd={world}/more.jsonl?checker=contains",
    )
    assert request.keep == (f"text={world}/plain.txt", f"other={world}/toy_ab.yaml?split=train")
    assert request.grid == world / "grid.yml"
    assert (request.methods, request.max_new_tokens, request.dtype) == (("ties",), 3, "float32")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_one_command_from_weights_to_the_table(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what the suite names lies beside it, not here
    command = ["compare", "--suite", str(write(world)), "--out", "out", "--device", "cpu"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    summary = json.loads(Path("out/summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert {"base", "expert east", "weight_patching", "task_arithmetic", "regmean"} <= set(rows)
    assert summary["tasks"] == ["ab", "dd"]
    assert rows["expert east"]["tasks"]["ab"]["value"] == 1
    assert rows["expert west"]["tasks"]["dd"]["value"] == 1
    assert set(rows["task_arithmetic"]["kept"]) == {"text", "other"}
    assert rows["regmean"]["cost"]["prompts"] == 12
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    found = {
        (line["task"], line["split"]): [
            each["item"]
            for each in lines
            if (each["model"], each["task"], each["split"]) == ("base", line["task"], line["split"])
        ]
        for line in lines
        if line["model"] == "base"
    }
    assert len(found["ab", "valid"]) == 3 and len(found["ab", "test"]) == 5
    assert len(found["dd", "valid"]) == 4, "three of a saved dataset, one of a file"
    assert len(found["dd", "test"]) == 3 and ("other", "valid") not in found
    assert "worst loss" in Path("out/table.md").read_text()

    monkeypatch.setattr("mergekit_wp.comparison.suites.prepare.fit", None)  # not fitted again
    again = CliRunner().invoke(
        cli, [*command, "--methods", "weight_patching,task_arithmetic,regmean,linear"]
    )
    assert again.exit_code == 0, again.output
    write(world, fit=SUITE["fit"] | {"steps": 4})
    other = CliRunner().invoke(cli, command)
    assert isinstance(other.exception, UserError)
    assert "out holds a fit of another suite" in str(other.exception)


def test_items_that_will_be_fitted_on_are_said_before_the_fit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no peer learns from the prompts."""
    said: list[str] = []

    def fitted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_wp.comparison.suites.prepare._fitted", fitted)
    items, quick = {"dd": ["items.jsonl?checker=contains"]}, {"methods": ["task_arithmetic"]}
    path = write(world, test=items, validation=None, keep=None, compare=quick | {"untuned": True})
    with pytest.raises(KeyboardInterrupt):
        prepare(path, {"out": tmp_path / "out", "device": "cpu"}, NotesOnly(said.append))
    told = "warning: 3 of 3 test items of task 'dd' are among the prompts of "
    assert len(said) == 2 and all(line.startswith(told) for line in said)


@pytest.mark.parametrize("option", ["quick", "untuned"])
def test_what_tunes_nothing_leaves_out_a_suites_validation_items(
    world: Path, tmp_path: Path, option: str
) -> None:
    items = {"dd": ["items.jsonl?checker=contains"]}
    path = write(world, test=items, validation={"dd": ["more.jsonl?checker=contains"]}, keep=None)
    options: dict[str, Any] = {"out": tmp_path / "out", "device": "cpu", option: True}
    assert not outlook(path, options).plan.tuned
    asked = ("dd=more.jsonl?checker=contains",)
    with pytest.raises(UserError, match="nothing is chosen by validation"):
        outlook(path, options | {"validation": asked})


def test_a_fit_is_known_by_what_it_was_made_of(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the paths: the same command from elsewhere takes it, other contents do not."""
    own = tmp_path / "own"
    shutil.copytree(world, own)
    tasks = {"dd": ["items.jsonl?checker=contains"]}
    same: dict[str, Any] = {"test": tasks, "validation": None, "keep": None}
    same["compare"] = {"methods": ["task_arithmetic"], "untuned": True}
    monkeypatch.chdir(tmp_path)

    def prepared(out: str | Path, **changed: Any) -> None:
        prepare(write(own, **same | changed), {"out": out, "device": "cpu"}, NoProgress())

    prepared("out")
    monkeypatch.setattr("mergekit_wp.comparison.suites.prepare.fit", None)  # not fitted again
    prepared(tmp_path / "out")
    for changed, said in (
        ({"base": "west"}, "base or experts"),
        ({"fit": SUITE["fit"] | {"limit": 1.5}}, "--limit|limit"),
        ({"fit": SUITE["fit"] | {"steps": 4}}, "steps"),
        ({"experts": SUITE["experts"] | {"ab": {"model": "east", "prompts": "west.jsonl"}}}, "pro"),
    ):
        with pytest.raises(UserError, match=f"holds a fit of another suite, .*changed: {said}"):
            prepared("out", **changed)
    for name, said in (("open.jsonl", "guards"), ("east/model.safetensors", "expert east")):
        before = (own / name).read_bytes()
        other = "west/model.safetensors" if name.startswith("east") else "west.jsonl"
        (own / name).write_bytes((own / other).read_bytes())
        with pytest.raises(UserError, match=f"changed: {said}"):
            prepared("out")
        (own / name).write_bytes(before)
    prepared("out")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_ask_for_what_they_say(path: Path, tmp_path: Path) -> None:
    suite = Suite.read(path)
    request = suite.compare_request(tmp_path / "recipe.yml", out=tmp_path, device="cpu")
    fit = suite.fit_request(tmp_path / "experts.yml", tmp_path / "fit", device="cpu")
    assert len(fit.prompts) == len(suite.experts) >= 3 and request.relative
    assert set(suite.validation) == set(suite.test) == set(suite.experts)
    chosen = [spec for specs in suite.validation.values() for spec in specs]
    assert not any("ifeval" in spec for spec in chosen) and "lm-eval:ifeval" in str(suite.test)
    (instruction,) = suite.validation["instruction"]
    items = JsonlTask.read(Path(instruction), Checkers.load(None), usual="valid")
    assert items.count("valid") == 96 and {i["checker"] for i in items.items} == {"ifeval"}
    known = {"weight_patching", *peers(len(suite.experts))}
    assert set(request.methods or known) <= known
    for name in ("reports", "stories", "talk"):
        assert all(Path(place).is_file() for place in suite.keep[name])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_shipped_suites_name_tasks_that_there_are() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for path in SHIPPED:
        suite = Suite.read(path)
        for named in (suite.test, suite.validation, suite.keep):
            sources = [Location.parse(spec) for specs in named.values() for spec in specs]
            asked = [source.name for source in sources if source.kind == "harness"]
            assert set(asked) <= known, path


TAKEN = "lm-eval:gsm8k?split=a"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": None}, "suite.yml: base: Field required"),
        ({"bases": "x"}, "suite.yml: bases: Extra inputs are not permitted"),
        ({"experts": {"ab": {"model": "east"}}}, "suite.yml: experts.ab.prompts: Field required"),
        ({"experts": {}}, "suite.yml: experts: Dictionary should have at least 1 item"),
        ({"test": {"ab": []}}, "suite.yml: test: Value error, 'ab': expected a name"),
        ({"test": {"a=b": ["x"]}}, "suite.yml: test: Value error, 'a=b': expected a name without"),
        ({"validation": {"cc": ["x"]}}, "validation.cc: 'test' has no 'cc'"),
        ({"test": {"ab": ["t?splt=x"]}}, "suite.yml: t.splt=x: 'splt=x' cannot be read"),
        (
            {"test": {"ab": [TAKEN]}, "validation": {"ab": [f"{TAKEN}&sample=3"]}},
            "validation.ab: lm-eval:gsm8k.split=a&sample=3 is what 'test' reports as well",
        ),
        ({"generation": {"dtype": "int8"}}, "suite.yml: generation.dtype: Input should be"),
        ({"fit": {"step": 3}}, "suite .*suite.yml: there is no option step"),
        ({"compare": {"repeats": 0}}, "suite .*suite.yml: repeats: it should be greater"),
        (
            {"experts": {"ab": {"model": "east", "prompts": "none.jsonl"}}},
            "suite.yml: experts.ab.prompts: prompt file none.jsonl cannot be read",
        ),
        (
            {"test": {"ab": ["open.jsonl"]}, "validation": {}},
            "suite.yml: test.ab: task file .*open.jsonl, line 1: 'split' is None",
        ),
    ],
)
def test_mistakes_name_the_file_and_the_key(
    world: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = write(world, **changed)
    with pytest.raises(UserError, match=message):
        prepare(path, {"out": tmp_path, "device": "cpu"}, NoProgress())
    assert not (tmp_path / "fit").exists()


def test_a_suite_stands_alone_and_needs_a_folder(world: Path, tmp_path: Path) -> None:
    path = write(world)
    with pytest.raises(UserError, match=r"suite=.*suite.yml needs out: the fit is kept there"):
        wp.compare(suite=path)
    with pytest.raises(UserError, match="names the experts, their prompts and the tasks"):
        wp.compare("recipe.yml", suite=path, out=tmp_path)
    with pytest.raises(UserError, match="give both, or suite=FILE"):
        wp.compare("recipe.yml")
    (world / "list.yml").write_text("- a")
    for name, said in (("none", "cannot be read"), ("list", "is no mapping with 'base'")):
        with pytest.raises(UserError, match=rf"suite .*{name}.yml {said}"):
            wp.compare(suite=world / f"{name}.yml", out=tmp_path)
    (world / "list.yml").unlink()
