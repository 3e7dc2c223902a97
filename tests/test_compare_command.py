"""What a comparison shows, and its command: tables, the page, Python's call, bad input."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_wp.cli import cli
from mergekit_wp.comparison.compare import compare
from mergekit_wp.comparison.page import html_page
from mergekit_wp.comparison.request import CompareRequest
from mergekit_wp.comparison.resampling import Resampled
from mergekit_wp.comparison.results import Job, Results
from mergekit_wp.comparison.rows import Comparison, Row, Setting, Trial
from mergekit_wp.comparison.table import markdown_table, summary, terminal_table
from mergekit_wp.errors import UserError, spelled
from mergekit_wp.models.load import load_folder
from mergekit_wp.models.model_names import place
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.tasks.task import ItemScore
from tests.comparing import Distance
from tests.merging import Family, llama_config
from tests.models import save_tokenizer, write_prompts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family.make(tmp_path_factory.mktemp("run"), llama_config(vocab_size=40))
    save_tokenizer(made.base.path)
    return made


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


def test_a_choice_at_an_end_of_its_grid_is_said() -> None:
    def tuned(name: str, *tried: Setting) -> Row:
        trials = tuple(Trial(setting, 0.1) for setting in tried)
        return Row(name, "peer", tried[0], {"t": [[1.0, 0.0]]}, valid=0.1, trials=trials)

    made = table_of(
        Row("base", "base", scores={"t": [[0.0, 0.0]]}),
        Row("expert a", "expert", scores={"t": [[1.0, 1.0]]}),
        tuned("ours", {"lambda": 1.0}, {"lambda": 0.7}, {"lambda": 1.3}),
        tuned("ties", {"density": 0.2, "lambda": 1.0}, {"density": 0.5, "lambda": 1.0}),
        tuned("fisher", {"normalize": True}, {"normalize": False}),
        tuned("sce", {"select_topk": 1.0}, {"select_topk": 0.5}),
        tuned("linear", {"base_weight": 0.0}, {"base_weight": 0.5}),
        tuned("regmean", {"x": 0.9, "y": 2}, {"x": 0.1, "y": 1}),
    )
    said = "better may lie beyond it: ties (density 0.2), regmean (x 0.9, y 2)"
    for text in (terminal_table(made), markdown_table(made), html_page(made, "x")):
        assert said in text
    assert "an end of" not in terminal_table(table_of(*made.comparison.rows[:3]))


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
            {"prompt": p + q, "pattern": "", "checker": "regex", "split": split}
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
    (world / "grid.yml").write_text("ties: {density: [0.2, 0.5], lambda: [0.7, 1.0]}")
    options = ["--methods", "weight_patching,ties", "--relative", "--grid", str(world / "grid.yml")]
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


def test_aim_comes_with_a_calibration(world: Path) -> None:
    """Without one `test_from_python` finds it left out."""
    calibration = str(world / "calibration.jsonl")
    done = invoke(world, str(world / "recipe.yml"), "--untuned", "--calibration", calibration)
    assert "ties+aim (untuned)" in done.stdout, done.output
    assert "AIM is left out" not in done.stderr


def test_a_failed_merge_ends_with_one(world: Path) -> None:
    (world / "mine.py").write_text(
        "calls = []\n"
        "def flaky(item, output):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 24: raise ValueError('late')\n"
        "    return 1\n"
    )
    for name in ("one", "two"):
        text = (world / f"{name}.jsonl").read_text().replace("regex", "flaky")
        (world / f"{name}.jsonl").write_text(text)
    command = [str(world / "recipe.yml"), "--methods", "weight_patching,ram", "--untuned"]
    done = invoke(world, *command, "--checkers", str(world / "mine.py"))
    # 6 test items of 2 tasks: base and one expert are measured before the checker breaks
    assert done.exit_code == 1
    assert "failed: expert expert1, weight_patching (untuned), ram (untuned)" in done.stderr
    assert "checker 'flaky' fails on item" in (world / "out" / "table.md").read_text()


def test_from_python(world: Path, family: Family) -> None:
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
    assert "AIM is left out: it needs --calibration" in done.stderr
    assert done.exit_code == 0 and "+aim" not in done.stdout
    assert f"'{family.experts[0].path}' has no tokenizer; that of the merges is used" in said
    assert found.table() in done.stdout and "<svg" in found.report() and not found.failed
    pandas = pytest.importorskip("pandas")
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
        (["recipe.yml", "recipe.yml", "recipe.yml"], "two recipes are called 'FOLDER'"),
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
    assert message.replace("FOLDER", world.name) in str(done.exception)
    assert not (world / "out").exists()


def test_one_model_may_be_written_in_several_ways(
    world: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
    relative = yaml.safe_load((world / "fixed.yml").read_text())
    places = [relative, *relative["models"]]
    for at, key in zip(places, ("base_model", *["model"] * (len(places) - 1)), strict=True):
        at[key] = os.path.relpath(at[key])
    assert not any(os.path.isabs(model["model"]) for model in relative["models"])
    (world / "fixed.yml").write_text(yaml.safe_dump(relative))
    done = invoke(world, str(world / "recipe.yml"), str(world / "fixed.yml"), "--dry-run")
    assert done.exit_code == 0, done.output


def test_an_adapter_is_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    here, whole, other = map(
        ModelReference.model_validate,
        ("base+adapter", f"{tmp_path}/base+./adapter", "owner/base+adapter"),
    )
    assert place(here) == place(whole) != place(other)


def test_recipes_of_other_models_are_refused(world: Path, family: Family) -> None:
    other = yaml.safe_load((world / "fixed.yml").read_text())
    other["models"] = other["models"][:1]
    (world / "fixed.yml").write_text(yaml.safe_dump(other))
    done = invoke(world, str(world / "recipe.yml"), str(world / "fixed.yml"))
    assert "fixed.yml has other models than" in str(done.exception)
