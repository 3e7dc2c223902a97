"""A whole comparison: choosing, resuming, failing."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration

from mergekit_wp import interrupts
from mergekit_wp.comparison.making import Making
from mergekit_wp.comparison.methods import peers
from mergekit_wp.comparison.results import Job, Results
from mergekit_wp.errors import UserError
from mergekit_wp.interrupts import Interrupted
from mergekit_wp.prompts import Prompt
from mergekit_wp.runs.progress import NoProgress
from tests.comparing import NORM, Distance, make_plan, planted, run
from tests.merging import Family, llama_config
from tests.models import save_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family.make(tmp_path_factory.mktemp("run"), llama_config(vocab_size=40))
    save_tokenizer(made.base.path)
    return made


@pytest.mark.parametrize("weight", [0.4, 0.8])
def test_the_planted_setting_is_chosen_and_reported(
    family: Family, tmp_path: Path, weight: float
) -> None:
    task = Distance("near", planted(family, weight))
    plan = make_plan(family, task, ("weight_patching", "task_arithmetic", "ram"))
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    assert rows["task_arithmetic"].setting == {"weight": weight}
    assert rows["task_arithmetic"].valid == pytest.approx(1, abs=1e-5)
    assert rows["task_arithmetic"].scores["near"] == [[pytest.approx(1, abs=1e-5)] * 4]
    assert list(rows) == [
        "base",
        "expert expert0",
        "expert expert1",
        "weight_patching",
        "weight_patching (untuned)",
        "task_arithmetic",
        "ram",
    ]
    away = float((family.base.state[NORM] - task.goal).abs().mean())
    assert rows["base"].scores["near"][0][0] == pytest.approx(1 / (1 + away), rel=1e-5)


def test_untuned_needs_no_validation(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.5), {"valid": 0, "test": 4})
    plan = make_plan(family, task, ("weight_patching", "task_arithmetic"))
    with pytest.raises(UserError, match="task 'near' has no 'valid' items: .* untuned=True"):
        plan.check()
    plan = replace(plan, tuned=False)
    plan.check()
    rows = run(plan, tmp_path).rows
    assert [row.name for row in rows[3:]] == [
        "weight_patching (untuned)",
        "task_arithmetic (untuned)",
    ]
    assert set(task.asked) == {"test"}
    task.counts["test"] = 0
    with pytest.raises(UserError, match="has no 'test' items: they are what is reported"):
        plan.check()


def test_aim_is_tuned_on_top_of_the_best_setting(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.7))
    plan = make_plan(family, task, ("task_arithmetic+aim",))
    with pytest.raises(UserError, match="AIM needs calibration=PROMPTS.jsonl"):
        plan.check()
    plan = replace(plan, calibration=(Prompt(prompt="abc"),))
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    setting = rows["task_arithmetic+aim"].setting
    assert setting["weight"] == 0.7 and setting["omega"] in (0.2, 0.4, 0.6)


def test_methods_that_draw_are_merged_with_every_seed(family: Family, tmp_path: Path) -> None:
    plan = make_plan(family, Distance("near", planted(family, 0.5)), ("dare_linear", "ties"))
    plan = replace(plan, tuned=False, seeds=3)
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    assert len(rows["ties (untuned)"].scores["near"]) == 1
    per_seed = rows["dare_linear (untuned)"].scores["near"]
    assert len({tuple(scores) for scores in per_seed}) == 3


def test_in_memory_and_on_disk_score_alike(family: Family, tmp_path: Path) -> None:
    plan = make_plan(family, Distance("near", planted(family, 0.5)), ("weight_patching", "ties"))
    plan = replace(plan, tuned=False)
    memory = run(plan, tmp_path / "m")
    disk = run(replace(plan, in_memory=False), tmp_path / "d")
    assert [row.scores for row in memory.rows] == [row.scores for row in disk.rows]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        ".lock",
        "comparison.json",
        "costs.jsonl",
        "results.jsonl",
    ]


def test_a_killed_comparison_goes_on_where_it_was(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.5))
    plan = make_plan(family, task, ("weight_patching", "task_arithmetic"))
    whole = run(plan, tmp_path / "whole")
    needed = len(task.asked)
    task.asked.clear()

    class Killed(BaseException):
        """Stands for SIGKILL."""

    task.error = Killed()
    task.fail_when = lambda _: len(task.asked) == 6
    with pytest.raises(Killed):
        run(plan, tmp_path / "killed")
    path = tmp_path / "killed" / "results.jsonl"
    with open(path, "a") as handle:
        handle.write('{"model": "torn')
    task.fail_when = None
    done = run(plan, tmp_path / "killed")
    assert done == whole
    assert len(task.asked) == needed + 1  # the one that was killed is done again
    before = len(task.asked)
    assert run(plan, tmp_path / "killed") == whole and len(task.asked) == before
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [(x["model"], str(x["setting"]), x["task"], x["split"], x["item"]) for x in lines]
    assert len(keys) == len(set(keys))


def test_half_a_job_is_done_again(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.5))
    plan = replace(make_plan(family, task, ("ties",)), tuned=False)
    whole = run(plan, tmp_path)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:-2]))
    task.asked.clear()
    assert run(plan, tmp_path) == whole
    assert len(task.asked) == 1


def test_a_merge_that_fails_is_recorded_and_tried_again(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.5), error=UserError("no\nway"))
    bad = planted(family, 0.5)  # where untuned task arithmetic lands
    task.fail_when = lambda weight: torch.allclose(weight, bad, atol=1e-6)
    plan = replace(make_plan(family, task, ("task_arithmetic", "ties")), tuned=False)
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    assert rows["task_arithmetic (untuned)"].failed == "no way"
    assert rows["ties (untuned)"].failed is None
    task.fail_when = None
    task.asked.clear()
    rows = {row.name: row for row in run(plan, tmp_path).rows}
    assert rows["task_arithmetic (untuned)"].failed is None
    assert len(task.asked) == 1
    assert "failed" not in (tmp_path / "results.jsonl").read_text()


@pytest.mark.parametrize(
    ("method", "where", "error"),
    [
        ("ram", "mergekit.merge_methods.ram._prepare_ram_vectors", ValueError("no\nway")),
        ("ram", "mergekit.merge_methods.ram._prepare_ram_vectors", RuntimeError("no shape")),
        ("weight_patching", "mergekit_wp.merging.method.fuse", UserError("no scores")),
        ("weight_patching", "mergekit_wp.merging.method.fuse", RuntimeError("CUDA out of memory")),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_mergekit_refuses_is_a_failed_row(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    where: str,
    error: Exception,
    in_memory: bool,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(where, refuse)
    plan = make_plan(family, Distance("near", planted(family, 0.5)), (method, "ties"))
    rows = {r.name: r for r in run(replace(plan, tuned=False, in_memory=in_memory), tmp_path).rows}
    said = rows[f"{method} (untuned)"].failed
    assert said is not None and said.endswith(" ".join(str(error).split())), said
    assert rows["ties (untuned)"].failed is None


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError, ValueError])
@pytest.mark.parametrize("where", ["the task", "our method"])
def test_a_bug_of_ours_is_no_failed_row(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: type[Exception],
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error("ours")

    task = Distance("near", planted(family, 0.5), error=error("ours"))
    if where == "the task":
        task.fail_when = lambda _: True
    else:
        monkeypatch.setattr("mergekit_wp.merging.method.fuse", broken)
    plan = replace(make_plan(family, task, ("weight_patching",)), tuned=False)
    with pytest.raises(error, match="ours"):
        run(plan, tmp_path)
    results = tmp_path / "results.jsonl"
    assert not results.exists() or "failed" not in results.read_text()


def test_an_interrupted_merge_is_no_failed_one(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Distance("near", planted(family, 0.5))
    plan = replace(make_plan(family, task, ("ties",)), tuned=False)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:

        def struck(*_: Any) -> None:
            patch.setattr(interrupts._State, "raised", signal.SIGINT)
            raise ValueError("no shape")  # torch makes such errors of whatever is raised in it

        patch.setattr("mergekit_wp.comparison.making.merge_in_memory", struck)
        run(plan, tmp_path)
    assert stop.value.kept == tmp_path
    kept = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(kept) == 3 * 4 and not any("failed" in line for line in kept)
    assert all(row.failed is None for row in run(plan, tmp_path).rows)


def test_a_full_disk_stops_the_run_and_loses_nothing(family: Family, tmp_path: Path) -> None:
    task = Distance("near", planted(family, 0.5))
    task.error = OSError(28, "No space left on device")
    task.fail_when = lambda _: len(task.asked) == 3
    plan = replace(make_plan(family, task, ("ties",)), tuned=False)
    with pytest.raises(OSError, match="No space left"):
        run(plan, tmp_path)
    kept = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(kept) == 2 * 4 and not any("failed" in line for line in kept)
    task.fail_when = None
    run(plan, tmp_path)


def test_results_of_another_configuration_are_refused(family: Family, tmp_path: Path) -> None:
    plan = replace(
        make_plan(family, Distance("near", planted(family, 0.5)), ("ties",)), tuned=False
    )
    inputs = {"dtype": "float32", "tasks": {"near": "1"}}
    run(plan, tmp_path, inputs)
    with pytest.raises(UserError, match="another configuration; changed: dtype; add restart=True"):
        run(plan, tmp_path, inputs | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="changed: tasks: near .items, checkers or max_new"):
        run(plan, tmp_path, inputs | {"tasks": {"near": "2"}})
    with Results(tmp_path, {"dtype": "float64"}, restart=True) as results:
        assert not results.done
        with pytest.raises(UserError, match="another comparison is writing"):
            Results(tmp_path, {"dtype": "float64"}).__enter__()
    line = {"model": "base", "task": "near", "split": "test", "item": "0"}
    for damaged in ({"model": 3}, line, line | {"score": 1.0, "failed": "no way"}):
        (tmp_path / "results.jsonl").write_text(json.dumps(damaged) + "\n")
        with pytest.raises(UserError, match=r"results.jsonl, line 1 is damaged; add restart=True"):
            run(plan, tmp_path, {"dtype": "float64"})
    for damaged in ([], {"tasks": []}):
        (tmp_path / "comparison.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"comparison.json is damaged; add restart=True"):
            run(plan, tmp_path, {"dtype": "float64"})
    (tmp_path / "comparison.json").unlink()
    with pytest.raises(UserError, match="without its comparison.json"):
        Results(tmp_path, {"dtype": "float64"}).__enter__()


def test_tasks_and_recipes_can_be_added_and_left_out(family: Family, tmp_path: Path) -> None:
    near, far = (Distance(name, planted(family, w)) for name, w in (("near", 0.5), ("far", 1.0)))
    plan = replace(make_plan(family, near, ("ties",)), tuned=False)
    run(plan, tmp_path, {"tasks": {"near": "1"}})
    near.asked.clear()
    both = run(replace(plan, tasks=(near, far)), tmp_path, {"tasks": {"near": "1", "far": "2"}})
    assert not near.asked, "what was measured is not measured again"
    assert set(both.rows[-1].scores) == {"near", "far"}
    far.asked.clear()
    run(replace(plan, tasks=(far,)), tmp_path, {"tasks": {"far": "2"}})
    assert not far.asked
    with pytest.raises(UserError, match="changed: tasks: near"):
        run(plan, tmp_path, {"tasks": {"near": "3"}})


@pytest.mark.parametrize("name", ["ties", "ram"])
def test_a_recipe_may_be_called_as_a_method(family: Family, tmp_path: Path, name: str) -> None:
    """What is measured under a name, with its setting, says which of the two it is."""
    half = family.recipe() | {"merge_method": "task_arithmetic"}
    half["models"] = [
        {"model": m["model"], "parameters": {"weight": w}}
        for m, w in zip(half["models"], (0.25, 0.75), strict=True)
    ]
    recipe = MergeConfiguration.model_validate(half)
    plan = make_plan(family, Distance("near", torch.ones(1)), ("ties", "ram"))
    making = Making(
        replace(plan, extra={name: recipe}), tmp_path, tmp_path, "2026-01-01", NoProgress()
    )
    asked = {"recipe": Job.of(name, {}, 0, "near", "test")}
    method = peers(2)[name]
    asked["method"] = Job.of(name, method.untuned, 0, "near", "test")
    norms = {}
    for what, job in asked.items():
        with making.of_job(job) as made:
            norms[what] = made.model.model.norm.weight.clone()
    with making.by_method(method, method.untuned, 0) as made:
        want = made.model.model.norm.weight
        assert torch.equal(norms["method"], want)
        # a method without parameters and a recipe of its name were one before they are made
        assert torch.equal(norms["recipe"], want) is (name == "ram")
