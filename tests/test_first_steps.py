"""What a newcomer types: it does the job, or one sentence says what to type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file

from mergekit_wp.autoload import ensure_registered
from mergekit_wp.cli import cli, main
from mergekit_wp.comparison.methods import methods_of
from mergekit_wp.criteria import Reference
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.models.checkpoint import Checkpoint
from mergekit_wp.runs.progress import NoProgress
from mergekit_wp.runs.references import References
from mergekit_wp.runs.warnings import warn_of_completeness, warn_of_references
from tests.every_command import make_world
from tests.merging import Family, llama_config
from tests.test_lora import make_adapter

METHOD = "weight_patching"
FIT = "--steps 2 --prompts-a-step 2 --max-new-tokens 2 --device cpu"
BOTH = "--prompts east=east.jsonl --prompts west=west.jsonl"
SWAPPED = BOTH.replace("east=", "base=")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("first") / "a world")


@pytest.fixture
def world(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder whose name has a space, which is the current one."""
    monkeypatch.chdir(shutil.copytree(fresh, tmp_path / "a world"))
    return Path.cwd()


def run(line: str) -> Result:
    return CliRunner().invoke(cli, shlex.split(line))


def done(line: str) -> str:
    result = run(line)
    assert result.exception is None, f"{line}: {result.exception!r}"
    return result.output


def refused(line: str) -> str:
    error = run(line).exception
    assert isinstance(error, UserError), repr(error)
    return str(error)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_whole_job_and_every_step_of_it_again(world: Path) -> None:
    said = done(f"merge base east west {BOTH} --out merged --quiet {FIT}")
    assert said.splitlines()[-1] == "merged model written to merged"
    assert "could not be told" not in said
    assert "base_model_relation: merge" in Path("merged/README.md").read_text()
    done("merge merged/merge/recipe.yml again --quiet")
    assert same(Path("merged"), Path("again"))
    # a recipe in the place of the models; and the fit by itself, as the file says it was made
    done(f"merge recipe.yml {BOTH} -o by-recipe --quiet {FIT}")
    assert same(Path("merged"), Path("by-recipe"))
    printed = done("reproduce merged/merge/east.safetensors")
    assert "mergekit-wp fit base east west" in printed
    command = printed[printed.index("fit base") :].strip().replace("merged/merge", "by-fit")
    assert "by-fit/east.safetensors, by-fit/west.safetensors written" in done(command)
    assert refused(f"merge base east west {BOTH} --out merged {FIT}") == (
        "merged holds a model already; add --overwrite to replace it, or choose another name"
    )


def test_a_fit_killed_while_it_writes_its_files_goes_on(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its own files, not over one that somebody made meanwhile."""
    fit = f"fit base east west {BOTH} --out t {FIT}"
    with monkeypatch.context() as patched:
        patched.setattr("mergekit_wp.joint.files.company_recipe", lambda *_: 1 / 0)
        assert isinstance(run(fit).exception, ZeroDivisionError)
    assert Path("t/west.safetensors").exists() and not Path("t/recipe.yml").exists()
    shutil.move("t/west.safetensors", "kept.safetensors")
    done("score base west --prompts west.jsonl -o t/west.safetensors --kinds layer --verify 0")
    assert "t/west.safetensors exists already" in refused(fit)
    shutil.move("kept.safetensors", "t/west.safetensors")
    done(fit)
    assert not Path("t/fit.partial").exists()


@pytest.fixture
def unmerged(world: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The whole job, whose merge failed; from now on nothing is fitted."""
    job = f"merge base east west {BOTH} --out merged --quiet {FIT}"
    with monkeypatch.context() as patched:
        patched.setattr("mergekit_wp.merging.merge.run_merge", lambda *_, **__: 1 / 0)
        assert isinstance(run(job).exception, ZeroDivisionError)
    assert [path.name for path in Path("merged").iterdir()] == ["merge"]
    monkeypatch.setattr("mergekit_wp.api._fit", lambda *_: 1 / 0)
    return job


def test_a_job_whose_merge_failed_goes_on_with_it(unmerged: str) -> None:
    shutil.copy("east.jsonl", "other-name.jsonl")
    job = unmerged.replace("east=east.jsonl", "east=other-name.jsonl").replace(" base ", " ./base ")
    assert "merged model written to merged" in done(f"{job} --steps 1")
    done("merge merged/merge/recipe.yml again --quiet")
    assert same(Path("merged"), Path("again"))
    assert "merged holds a model already" in refused(unmerged)
    assert isinstance(run(f"{unmerged} --overwrite").exception, ZeroDivisionError), "that fits"


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("--limit 1.5", "--limit (1.01 -> 1.5)"),
        ("--limit-of plain-text=1.5", "--limit-of (none -> plain-text=1.5)"),
        ("--unguarded", "--guard, --unguarded"),
        ("--steps 3", "--steps (2 -> 3)"),
        ("--guard open.jsonl", "--guard"),
        ("--prompts east=open.jsonl", "prompts of east"),
    ],
)
def test_a_fit_of_something_else_is_not_merged_by(unmerged: str, more: str, changed: str) -> None:
    if more.startswith("--prompts"):
        unmerged, more = unmerged.replace("east=east.jsonl", "east=open.jsonl"), ""
    assert refused(f"{unmerged} {more}") == (
        f"merged/merge holds a finished fit of something else; changed: {changed}; merge by it "
        "with `mergekit-wp merge merged/merge/recipe.yml merged`, add --overwrite to fit anew, or "
        "choose another --out"
    )


def test_a_fit_of_other_contents_is_not_merged_by(unmerged: str) -> None:
    recipe = Path("merged/merge/recipe.yml")
    recipe.write_text(recipe.read_text() + "tokenizer_source: base\n")
    shutil.copy("east/model.safetensors", "west/model.safetensors")
    with open("east.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "cab", "response": "ab"}) + "\n")
    changed = "changed: prompts of east, expert west, recipe.yml; merge by it"
    assert changed in refused(unmerged)
    shutil.move("merged/merge/west.safetensors", "elsewhere.safetensors")
    assert "changed: the experts; merge by it" in refused(unmerged)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge base east west", "expected RECIPE OUT; or BASE EXPERT ... with --prompts"),
        ("merge recipe.yml", "expected RECIPE OUT; or BASE EXPERT ... with --prompts"),
        ("merge recipe.yml out --steps 3", "--steps goes with experts that are fitted: give"),
        (f"merge base east west {BOTH}", "--prompts goes with --out OUT"),
        ("merge base east west --prompts east=east.jsonl -o o", "expert 'west' has no prompts"),
        (f"merge base east east {BOTH} -o o", "expert 'east' is given twice; name each once"),
        (f"merge base east west {BOTH} -o west --overwrite", "west is an input of the merge"),
        (
            f"score base east west {BOTH} -o o",
            "score measures one expert, and 'west' is one more; ",
        ),
    ],
)
def test_what_to_type(world: Path, line: str, message: str) -> None:
    assert message in refused(line)
    assert not Path("o").exists() and not Path("out").exists()


def test_a_fit_of_several_experts_needs_no_recipe(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what they are merged by is found from anywhere, and moves with its folder."""
    done(f"fit base east west {BOTH} --out together {FIT}")
    done(f"fit recipe.yml {BOTH} --out by-recipe {FIT}")
    for name in ("east", "west"):
        ours, theirs = (
            scorefile.read(f"{folder}/{name}.safetensors") for folder in ("together", "by-recipe")
        )
        assert all(torch.equal(value, theirs.tensors[key]) for key, value in ours.tensors.items())
        assert ours.manifest.command[:4] == ("fit", "base", "east", "west")
    models = yaml.safe_load(Path("together/recipe.yml").read_text())["models"]
    assert [m["parameters"]["scores"] for m in models] == ["east.safetensors", "west.safetensors"]
    done("merge together/recipe.yml here --quiet")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done(f"merge {shlex.quote(str(world / 'together' / 'recipe.yml'))} there --quiet")
    shutil.move(world / "together", elsewhere / "moved")
    done("merge moved/recipe.yml moved-merge --quiet")
    ensure_registered()
    stock = CliRunner().invoke(mergekit_yaml, ["moved/recipe.yml", "stock", "--quiet"])
    assert stock.exception is None, stock.exception
    for found in ("there", "moved-merge", "stock"):
        assert same(world / "here", elsewhere / found), found


def test_relative_models_beside_a_recipe(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of any method, run from another folder; what is kept of it is right from there."""
    recipe = yaml.safe_load(Path("recipe.yml").read_text())
    for model in recipe["models"]:
        model["parameters"] = {"weight": 0.5}
    Path("half.yml").write_text(yaml.safe_dump(recipe))
    done("merge half.yml here --quiet")
    Path("other").mkdir()
    monkeypatch.chdir("other")
    done("merge ../half.yml there --quiet")
    assert same(world / "here", Path("there"))
    kept = yaml.safe_load(Path("there/mergekit_config.yml").read_text())
    assert kept["base_model"] == str(world / "base")


def test_compare_where_paths_have_spaces(world: Path) -> None:
    """mergekit fails to write a model's path with a space as JSON."""
    done(f"fit base east west {BOTH} --out together {FIT}")
    items = shlex.quote(str(world / "items.jsonl"))
    done(
        f"compare together/recipe.yml --task {items} --out c --untuned --max-new-tokens 2 "
        "--methods weight_patching,ties --merge-in disk --device cpu"
    )
    written = yaml.safe_load(next(Path("c/recipes").glob("ties*.yml")).read_text())
    assert written["base_model"] == str(world / "base") and " " in written["base_model"]


def test_printed_commands_are_quoted(world: Path) -> None:
    Path("my scores").mkdir()
    said = done(
        "score base east --prompts east.jsonl -o 'my scores/e.safetensors' --kind layer "
        "--estimand gain --verify 0"
    )
    assert "mergekit-wp inspect 'my scores/e.safetensors'" in said
    done("inspect 'my scores/e.safetensors' --kinds layer")


@pytest.mark.parametrize("bare", [True, False])
def test_an_adapter_from_score_to_card(world: Path, bare: bool) -> None:
    """peft's merged model is the oracle; no step asks for a cache."""
    adapter, merged = make_adapter(world / "base", world / "lora")
    config = adapter / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../../base"})
    )
    expert = "lora/adapter" if bare else "base+lora/adapter"
    for name in (expert, "lora/merged"):
        key = Path(name).name
        done(
            f"merge base east {name} --prompts east=east.jsonl --prompts {key}=west.jsonl "
            f"--out {key} --quiet --granularity component {FIT}"
        )
    one, two = weights(Path("adapter")), weights(Path("merged"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)
    made = scorefile.read("adapter/merge/adapter.safetensors").manifest
    assert made.expert.reference.endswith("base+lora/adapter")
    done(
        "compare adapter/merge/recipe.yml --task items.jsonl --out c --untuned --device cpu "
        "--methods weight_patching,task_arithmetic --max-new-tokens 2"
    )
    assert json.loads(Path("c/summary.json").read_text())
    assert not list(Path("c").glob(".merge*"))
    done("card adapter --results c")
    assert (merged / "model.safetensors").is_file()


def test_an_adapter_of_nothing(world: Path) -> None:
    adapter, _ = make_adapter(world / "base", world / "lora")
    config = adapter / "adapter_config.json"
    stated = json.loads(config.read_text())
    for named, message in (
        (None, "does not say in adapter_config.json what it was trained on; write 'BASE+lora/"),
        ("/gone/base", "was trained on '/gone/base', which is not there; write 'BASE+lora/adapter"),
    ):
        config.write_text(json.dumps(stated | {"base_model_name_or_path": named}))
        with pytest.raises(UserError, match="adapter 'lora/adapter'") as error:
            Checkpoint("lora/adapter")
        assert message in str(error.value)


def test_nothing_finished_is_replaced_unasked(world: Path) -> None:
    score = "score base east --prompts east.jsonl --out e.safetensors --kinds layer --verify 0"
    done(score)
    before = Path("e.safetensors").read_bytes()
    assert "e.safetensors exists already" in refused(score)
    assert "e.safetensors exists already" in refused(f"{score} --restart")
    assert Path("e.safetensors").read_bytes() == before
    done(f"{score} --overwrite --estimand gain")
    assert Path("e.safetensors").read_bytes() != before
    together = f"fit base east west {BOTH} --out t {FIT}"
    done(together)
    assert "recipe.yml exists already" in refused(together)
    Path("t/recipe.yml").rename("t/mine.yml")
    assert "t/east.safetensors exists already; add --overwrite" in refused(together)
    Path("t/mine.yml").rename("t/recipe.yml")
    done("merge t/recipe.yml m --quiet")
    assert "m holds a model already" in refused("merge t/recipe.yml m --quiet")
    done("merge t/recipe.yml m --quiet --overwrite")
    assert "m holds a model already" in refused(
        "aim m --out m --base base --calibration east.jsonl"
    ) or ("is an input" in refused("aim m --out m --base base --calibration east.jsonl"))


def notes(line: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    said = done(line)
    return said + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("score east base --prompts east.jsonl -o x.safetensors", "are less likely at the expert"),
        ("score base east --prompts west.jsonl -o x.safetensors --criterion kl,logprob", ""),
        (
            f"fit base east west {BOTH} -o x {FIT}",
            "of their tokens; the fit was not done",
        ),
        (f"fit east base west {SWAPPED} -o x {FIT}", "base and expert may be swapped"),
        (f"merge east base west {SWAPPED} -o x {FIT}", "base and expert may be swapped"),
    ],
)
def test_results_that_look_like_success(
    world: Path, capfd: pytest.CaptureFixture[str], line: str, warning: str
) -> None:
    assert warning in notes(f"{line} --device cpu", capfd)


class Noted(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_each_warning_and_its_way_out() -> None:
    told = Noted()
    zero = torch.zeros(4)
    values = {
        "kl": Reference(zero - torch.tensor([1.0, 2e-3, 1e-3, 0.0]), zero),
        "anchor": Reference(zero + 1, zero),
    }
    references = References([], [], values, None, Reference(zero - 1, zero - 2))
    warn_of_references(references, told, "inst")
    lower, likely, alike = told.notes
    assert "'anchor' of inst is lower for the expert than for the base (0 against 1)" in lower
    assert "are less likely at the expert than at the base (-2 against -1 nats" in likely
    assert likely.endswith("base and expert may be swapped, or the prompts those of another expert")
    assert "3 of 4 prompts of inst are answered by the expert as by the base" in alike
    assert alike.endswith("give prompts on which the expert behaves differently")
    told.notes.clear()
    warn_of_completeness({"share/kl": 0.43, "share/anchor": 1.05}, told)
    (short,) = told.notes
    assert "share/kl sums to 0.43" in short
    assert "where exact scores sum to 1; give more" in short
    assert "share_steps" in short
    told.notes.clear()
    fine = References([], [], {"kl": Reference(zero - 1, zero)}, None, Reference(zero - 2, zero))
    warn_of_references(fine, told)
    warn_of_completeness({"share/kl": 0.95}, told)
    assert not told.notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "score base east --prompts east.jsonl --prompts west.jsonl --out no",
            "--prompts is given 2 times; give it once",
        ),
        (
            "merge base east west --prompts east=east.jsonl,west=west.jsonl --out no",
            "'east=east.jsonl,west=west.jsonl' is several in one; give the option once for each: "
            "east=east.jsonl and west=west.jsonl",
        ),
        (
            f"merge base east west {BOTH} --guard east.jsonl,west.jsonl --out no --device cpu",
            "prompt file east.jsonl,west.jsonl cannot be read: there is no such file; it looks "
            "like several: give the option once for each",
        ),
        (
            "score base/none east --prompts east.jsonl --out no --device cpu",
            "model 'base/none' cannot be read: there is no such folder, and the Hub, which is not "
            "in reach, has left nothing of that name in the cache",
        ),
        (
            "score base east+none --prompts east.jsonl --out no --device cpu",
            "adapter 'none' cannot be read: there is no such folder, and the Hub, which is not",
        ),
        (
            "score base east --prompts chats.jsonl --out no --device cpu",
            "prompt file chats.jsonl: prompt 1: these are chat messages, but the tokenizer has no "
            "chat template; give plain prompts",
        ),
        ("mergee base", "there is no command 'mergee'; did you mean 'merge'? (mergekit-wp --help"),
        ("merge none.yml out", "recipe none.yml cannot be read: there is no such file"),
        ("compare base --task t --out no", "recipe base cannot be read: it is a folder; a recipe"),
        (
            "compare . --task east.jsonl --out no",
            "recipe . cannot be read: it is a folder; give recipe.yml",
        ),
        ("inspect east", "east is a folder; give one of the score files in it"),
        ("merge a.safetensors b.safetensors -o no", "by the recipe that was written beside them"),
    ],
)
def test_everyday_mistakes_are_one_sentence(
    world: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # between tries to reach the Hub
    chat = [{"from": "human", "value": "abc"}, {"from": "gpt", "value": "d"}]
    (world / "chats.jsonl").write_text(json.dumps({"conversations": chat}) + "\n")
    assert message in refused(line)
    assert not (world / "no").exists()


def test_names_for_what_is_given_by_place(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ("score --base base --expert east --prompts east.jsonl", "there is no '--base': models,"),
        ("score recipe.yml --out no --prompts east=east.jsonl", "Missing argument 'EXPERT'."),
    ):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 2
        (said,) = capfd.readouterr().err.strip().splitlines()
        assert message in said
    with pytest.raises(UserError, match="unknown method 'TIES'; did you mean 'ties'"):
        methods_of(("TIES",), 2, None)


def test_tests_of_another_checkout_are_refused(tmp_path: Path) -> None:
    """The start-up hook imports what is installed before pytest looks at the folder it is in."""
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_a.py").write_text("def test_a(): pass\n")
    here = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(here)},
    )  # fmt: skip
    assert found.returncode == 4
    assert f"these tests are of {tmp_path}, but mergekit_wp is imported from {here}" in found.stderr


def test_strided_weights_as_mergekit_asks_of_every_method(tmp_path: Path) -> None:
    """The one test of mergekit's own suite that knows of ours: of all methods that are registered.

    There it ends at the missing score file, without which nothing can be merged; here it has one.
    """
    ensure_registered()
    family = Family.make(tmp_path, llama_config())
    states = {"base": family.base.state} | {
        str(e): expert.state for e, expert in enumerate(family.experts)
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    parameters = {"scores": {str(e): str(path) for e, path in enumerate(family.paths)}}
    with pytest.raises(TypeError, match="Missing required parameter scores"):
        merge_state_dicts({m: {name: s[name]} for m, s in states.items()}, METHOD, base="base")
    strided = {m: {name: s[name].T.contiguous().T} for m, s in states.items()}
    assert not any(tensors[name].is_contiguous() for tensors in strided.values())
    kept = {m: tensors[name].clone() for m, tensors in strided.items()}
    found, wanted = (
        merge_state_dicts(given, METHOD, base="base", parameters=parameters)[name]
        for given in (strided, {m: {name: s[name]} for m, s in states.items()})
    )
    assert torch.equal(found, wanted) and not torch.equal(found, states["base"][name])
    assert all(torch.equal(strided[m][name], tensor) for m, tensor in kept.items())
