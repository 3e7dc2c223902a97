"""A whole comparison: choosing, reporting, resuming, failing."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration

from mergekit_wp import interrupts
from mergekit_wp.cli import cli
from mergekit_wp.comparison.compare import compare
from mergekit_wp.comparison.making import Making
from mergekit_wp.comparison.methods import methods_of, peers
from mergekit_wp.comparison.page import html_page
from mergekit_wp.comparison.plan import Plan
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.results import Job, Results
from mergekit_wp.comparison.rows import Comparison, Row
from mergekit_wp.comparison.run import Runner
from mergekit_wp.comparison.table import markdown_table, summary, terminal_table
from mergekit_wp.errors import UserError, spelled
from mergekit_wp.interrupts import Interrupted
from mergekit_wp.models.generation import TextInterface
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.memory import AtOnce
from mergekit_wp.prompts import Prompt
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.tasks.task import ItemScore
from mergekit_wp.terms import Split
from tests.merging import Family, llama_config
from tests.models import save_tokenizer, write_prompts

torch.set_num_threads(1)
NORM = "model.norm.weight"


@dataclass
class Distance:
    """A task that is solved the better the closer one weight is to where it should be."""

    name: str
    goal: torch.Tensor
    counts: dict[str, int] = field(default_factory=lambda: {"valid": 3, "test": 4})
    fingerprint: str = "1"
    asked: list[str] = field(default_factory=list)
    fail_when: Any = None

    def count(self, split: Split) -> int:
        return self.counts[split]

    def question(self, item: str) -> str:
        return f"item {item} of {self.name}"

    def too_long(self, _model: Any, _tokenizer: Any) -> None:
        return None

    def evaluate(
        self, model: Any, asked: TextInterface, split: Split, at_once: AtOnce | None = None
    ) -> list[ItemScore]:
        weight = model.model.norm.weight
        self.asked.append(split)
        if self.fail_when is not None and self.fail_when(weight):
            raise self.error
        score = 1 / (1 + float((weight - self.goal).abs().mean()))
        return [ItemScore(str(i), score) for i in range(self.counts[split])]

    error: BaseException = field(default_factory=lambda: ValueError("no\nway"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family.make(tmp_path_factory.mktemp("run"), llama_config(vocab_size=40))
    save_tokenizer(made.base.path)
    return made


def make_plan(family: Family, task: Distance, names: tuple[str, ...], **options: Any) -> Plan:
    recipe = MergeConfiguration.model_validate(family.recipe())
    settings: dict[str, Any] = {
        "base": str(family.base.path),
        "experts": tuple(str(e.path) for e in family.experts),
        "names": ("expert0", "expert1"),
        "recipe": recipe,
        "extra": {},
        "methods": methods_of(names, 2, recipe),
        "tasks": (task,),
        "dtype": "float32",
        "device": "cpu",
        "eval_dtype": torch.float32,
    }
    return Plan(**(settings | options))


def run(plan: Plan, folder: Path, inputs: dict[str, Any] | None = None) -> Comparison:
    with Results(folder, inputs or {"a": 1}) as results:
        return Runner(plan, results, NoProgress()).run()


def planted(family: Family, weight: float) -> torch.Tensor:
    """Where task arithmetic with this weight puts the final norm."""
    start = family.base.state[NORM]
    return start + weight * sum(e.state[NORM] - start for e in family.experts)


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
    with pytest.raises(UserError, match="another configuration; changed: tasks: near; add"):
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


def table_of(*rows: Row, relative: bool = False) -> Resampled:
    tasks = tuple(next(r for r in rows if not r.failed).scores)
    return Resampled(Comparison(rows, tasks, relative, "ours"), 500)


def test_tables_carry_the_numbers() -> None:
    def scores(right: int, other: int) -> dict[str, list[list[float]]]:
        return {
            "t|1": [[1.0] * right + [0.0] * (40 - right)],
            "<u>": [[1.0] * other + [0.0] * (20 - other)],
        }

    made = table_of(
        Row("base", "base", scores=scores(0, 0)),
        Row("ours", "ours", {"lambda": 0.7}, scores(36, 18)),
        Row("ties", "peer", {"density": 0.5}, scores(12, 6), valid=0.4),
        Row("sce", "peer", failed="no <memory>"),
    )
    text = terminal_table(made)
    assert re.search(r"ours +0.90 +0.90  0.90 \[", text)
    assert re.search(r"ties +0.30 +0.30  0.30 \[.*-0.60 \[-.*0/36 worse", text)
    assert re.search(r"^sce failed: no <memory>$", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[2:])) <= 100
    markdown = markdown_table(made)
    assert r"| t\|1 |" in markdown and "| 0 / 36 |" in markdown
    rows = {row["name"]: row for row in summary(made)["rows"]}
    assert rows["ties"]["difference"]["verdict"] == "worse"
    assert rows["ties"]["difference"]["value"] == pytest.approx(-0.6)
    assert rows["sce"]["failed"] == "no <memory>" and rows["base"]["difference"] is None
    json.dumps(summary(made))


def test_the_page_is_offline_escaped_and_the_same_twice() -> None:
    def rows(*names: str) -> tuple[Row, ...]:
        scores = {name: [[1.0, 0.0, 1.0, 1.0]] for name in names}
        less = {name: [[0.0, 0.0, 1.0, 0.0]] for name in names}
        return (
            Row("base", "base", scores=less),
            Row("expert a", "expert", scores=scores),
            Row("ours", "ours", scores=scores),
            Row("ties <b>", "peer", {"density": 0.5}, less, valid=0.3),
            Row("sce", "peer", failed="no <memory>"),
        )

    for names in (("one",), ("one", "two"), ("<script>x</script>", "two", "$three$")):
        page = html_page(table_of(*rows(*names)), "3 experts & more")
        assert page == html_page(table_of(*rows(*names)), "3 experts & more")
        assert "<script" not in page and "<b>" not in page and "http" not in page
        assert "3 experts &amp; more" in page and "failed: no &lt;memory&gt;" in page
        assert "density 0.5" in page and 'name="viewport"' in page
        assert page.count("<svg") == 2
        assert "The best peer is ties &lt;b&gt; with" in page
        assert "The number is the accuracy: the part of the items" in page
        assert "scrolls sideways" in page and "cost</th>" not in page
        for key in ("base", "expert alone", "weight patching", "other method"):
            assert f">{key}</text>" in page, "a legend of the colours"
    from_experts = Resampled(Comparison(rows("one"), ("one",), True, "ours"), n=100)
    page = html_page(from_experts, "relative")
    assert "Accuracy relative to the expert, mean over tasks" in page


def test_samples_are_items_on_which_merges_differ_with_everybodys_answers(tmp_path: Path) -> None:
    rows = (
        Row("base", "base", scores={"one": [[0.0] * 5], "two": [[0.0] * 5]}),
        Row("ours (untuned)", "ours", scores={"one": [[1, 1, 0, 1, 0]], "two": [[1] * 5]}),
        Row("ties", "peer", {"density": 0.5}, {"one": [[1, 0, 1, 0, 0]], "two": [[1] * 5]}),
    )
    tasks = [Distance(name, torch.ones(1)) for name in ("one", "two")]
    with Results(tmp_path, {}) as results:
        for row in rows:
            for task, [scores] in row.scores.items():
                job = Job.of(row.measured_as, row.setting, 0, task, "test")
                told = [ItemScore(str(i), s, f"{row.name} {i} <i>") for i, s in enumerate(scores)]
                results.add(job, told)
        comparison = Comparison(rows, ("one", "two"), False, "ours (untuned)")
        samples = results.samples(comparison, tasks)
    assert [s.question for s in samples] == [f"item {i} of one" for i in (1, 2, 3)]
    assert samples[1].answers == {
        "base": ("base 2 <i>", 0),
        "ours (untuned)": ("ours (untuned) 2 <i>", 0),
        "ties": ("ties 2 <i>", 1),
    }
    page = html_page(Resampled(comparison, n=100), "some", samples)
    assert page.count("<details") == 3 and "<td>ties 2 &lt;i&gt;</td><td>right</td>" in page


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


@pytest.fixture
def world(family: Family, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(family.recipe()))
    other = family.recipe() | {"merge_method": "ties"}
    other["models"] = [
        {"model": m["model"], "parameters": {"weight": 1.0}} for m in other["models"]
    ]
    (tmp_path / "fixed.yml").write_text(yaml.safe_dump(other))
    for name, prompts in (("one", "abc"), ("two", "hgf")):
        lines = [
            {"prompt": p + q, "answer": "", "checker": "contains", "split": split}
            for p in prompts
            for q in "kl"
            for split in ("valid", "test")
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_prompts(tmp_path / "calibration.jsonl", 3)
    return tmp_path


def invoke(world: Path, *arguments: str) -> Result:
    tasks = ["--task", str(world / "one.jsonl"), "--task", f"zwei={world / 'two.jsonl'}"]
    out = ["--out", str(world / "out"), "--max-new-tokens", "3"]
    return CliRunner().invoke(cli, ["compare", *arguments, *tasks, *out])


def test_the_command(world: Path, family: Family) -> None:
    recipes = [str(world / "recipe.yml"), str(world / "fixed.yml")]
    options = ["--methods", "weight_patching,ties", "--relative"]
    done = invoke(world, *recipes, *options)
    assert done.exit_code == 0, done.output
    assert re.search(r"weight_patching +1.00 +1.00", done.output)
    assert re.search(r"^fixed ", done.output, re.MULTILINE)
    out = world / "out"
    found = json.loads((out / "summary.json").read_text())
    assert found["tasks"] == ["one", "zwei"] and found["reference"] == "weight_patching"
    assert "<svg" in (out / "report.html").read_text()
    assert "| ties |" in (out / "table.md").read_text()
    chosen = MergeConfiguration.model_validate(
        yaml.safe_load((out / "recipes" / "ties.yml").read_text())
    )
    assert chosen.merge_method == "ties"
    assert sorted(path.name for path in (out / "recipes").iterdir()) == [
        "fixed.yml",
        "ties.yml",
        "weight_patching-untuned.yml",
        "weight_patching.yml",
    ]
    merged = world / "merged"
    made = CliRunner().invoke(cli, ["merge", str(out / "recipes" / "ties.yml"), str(merged)])
    assert made.exception is None, made.exception
    load_folder(merged, torch.float32, "cpu")
    carded = CliRunner().invoke(cli, ["card", str(merged), "--results", str(out)])
    assert carded.exception is None, carded.exception
    assert "This model is **ties**" in (merged / "README.md").read_text()
    again = invoke(world, *recipes, *options)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-10:] == done.stdout.splitlines()[-10:]
    anew = invoke(world, str(world / "recipe.yml"), "--methods", "ram", "--restart")
    assert anew.exit_code == 0, anew.output
    assert "ram " in anew.output and "AIM" not in anew.output


def test_aim_is_left_out_aloud(world: Path) -> None:
    done = invoke(world, str(world / "recipe.yml"), "--untuned")
    assert "AIM is left out: it needs --calibration" in done.stderr
    assert done.exit_code == 0 and "+aim" not in done.stdout
    calibration = str(world / "calibration.jsonl")
    done = invoke(
        world, str(world / "recipe.yml"), "--untuned", "--calibration", calibration, "--restart"
    )
    assert "ties+aim (untuned)" in done.stdout, done.output


def test_a_failed_merge_ends_with_one(world: Path) -> None:
    (world / "mine.py").write_text(
        "calls = []\n"
        "def flaky(item, output):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 24: raise ValueError('late')\n"
        "    return 1\n"
    )
    for name in ("one", "two"):
        text = (world / f"{name}.jsonl").read_text().replace("contains", "flaky")
        (world / f"{name}.jsonl").write_text(text)
    command = [str(world / "recipe.yml"), "--methods", "weight_patching,ram", "--untuned"]
    done = invoke(world, *command, "--checkers", str(world / "mine.py"))
    # 6 test items of 2 tasks: base and one expert are measured before the checker breaks
    assert done.exit_code == 1
    assert "failed: expert expert1, weight_patching (untuned), ram (untuned)" in done.stderr
    assert "checker 'flaky' fails on item" in (world / "out" / "table.md").read_text()


def test_from_python(world: Path, family: Family) -> None:
    pandas = pytest.importorskip("pandas")
    tasks = (str(world / "one.jsonl"), f"zwei={world / 'two.jsonl'}")
    said: list[str] = []

    class Listener(NoProgress):
        def note(self, text: str) -> None:
            said.append(spelled(text))

    recipe = yaml.safe_load((world / "recipe.yml").read_text())
    request = CompareRequest(recipes=(recipe,), tasks=tasks, max_new_tokens=3, untuned=True)
    before = sorted(world.iterdir())
    found = compare(request, Listener())
    assert sorted(world.iterdir()) == before, "nothing is written unless a path is given"
    assert "AIM is left out: it needs calibration=PROMPTS.jsonl" in said
    done = invoke(world, str(world / "recipe.yml"), "--untuned")
    assert f"'{family.experts[0].path}' has no tokenizer; that of the merges is used" in said
    assert found.table() in done.stdout and "<svg" in found.report() and not found.failed
    frame = found.frame()
    assert isinstance(frame, pandas.DataFrame)
    rows = json.loads((world / "out" / "summary.json").read_text())["rows"]
    assert list(frame["name"]) == [row["name"] for row in rows]
    assert list(frame["zwei"]) == [row["tasks"]["zwei"]["value"] for row in rows]
    assert list(frame["mean_low"]) == [row["mean"]["low"] for row in rows]
    for given, message in (({"recipes": (recipe | {"models": []},)}, "recipe in memory"),):
        with pytest.raises(UserError, match=message):
            compare(request.model_copy(update=given), Listener())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fixed.yml"], "merges by ties; the first recipe must be the weight_patching one"),
        (
            ["recipe.yml", "--methods", "tise"],
            "unknown method 'tise'; did you mean 'ties'? known are weight_patching",
        ),
        (["recipe.yml", "--methods", "ties+aim"], "AIM needs --calibration"),
        (["recipe.yml", "fixed.yml", "fixed.yml"], "two recipes are called 'fixed'"),
        (["recipe.yml", "--task", "one.jsonl"], "two tasks are called 'one'"),
        (["recipe.yml", "--task", "none.jsonl"], "none.jsonl cannot be read"),
        (["recipe.yml", "--grid", "none.yml"], "none.yml cannot be read"),
        (["recipe.yml", "--calibration", "none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_bad_input(world: Path, arguments: list[str], message: str) -> None:
    named = [str(world / a) if re.search(r"\.(yml|jsonl)$", a) else a for a in arguments]
    done = invoke(world, *named)
    assert isinstance(done.exception, UserError), done.output
    assert message in str(done.exception)
    assert not (world / "out").exists()


def test_recipes_of_other_models_are_refused(world: Path, family: Family) -> None:
    other = yaml.safe_load((world / "fixed.yml").read_text())
    other["models"] = other["models"][:1]
    (world / "fixed.yml").write_text(yaml.safe_dump(other))
    done = invoke(world, str(world / "recipe.yml"), str(world / "fixed.yml"))
    assert "fixed.yml has other models than" in str(done.exception)
